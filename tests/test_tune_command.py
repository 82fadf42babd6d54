"""`quanttune tune`: what it trains and writes, and that a killed run ends as if it had not been."""

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from cases import (
    LOADERS,
    bert_case,
    contents,
    opt_case,
    run,
    save_tokenizer,
    some_words,
    tune,
    write_csv,
)
from models import WORDS
from oracle import assert_near, constant, quiet
from safetensors.torch import load_file
from slow import wanted
from transformers import BertConfig, BertForSequenceClassification

from quanttune.jobs.models import match_labels, resolve

pytestmark = quiet
# ------------------------------------------------------------------ killed and resumed

STEPS = ["--steps", "15", "--batch-size", "4", "--save-steps", "3", "--learning-rate", "1e-3"]
OTHERS = [
    *("--balance", "initial", "--decay", "cosine"),
    *("--recipe", "--refit-rows", "8", "--finish-steps", "10"),  # step 7 is a rounded one
    *("--trainer", "gradient_accumulation_steps=2", "--trainer", "warmup_steps=3"),
]
# where the processes of a run die, one after the other; the last one ends. An epoch has 5 steps.
LANES = {
    "not at all": [None],
    "before the first checkpoint, otherwise": [["step", 2], None],
    "between two checkpoints": [["step", 7], None],
    "with a checkpoint half written": [["writing", 12], None],
    "with a checkpoint not marked": [["mark", 9], None],
    "before the model has its name": [["publish", 15], None],
    "three times": [["begin", 0], ["interrupt", 4], ["step", 10], None],
    "not at all, otherwise": [None],
    "between two checkpoints, otherwise": [["step", 7], None],
}


@pytest.fixture(scope="module")
def lanes(request, tmp_path_factory):
    """Run the lanes that are asked for; return for each its folder, its log and the exit codes."""
    if not hasattr(os, "fork"):
        pytest.skip("the processes are forks")
    root = tmp_path_factory.mktemp("lanes")
    torch.manual_seed(0)
    config = BertConfig(  # with dropout
        vocab_size=WORDS, hidden_size=24, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=48, max_position_embeddings=16,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(root / "bert")
    save_tokenizer(root / "bert")
    lengths = torch.randint(3, 9, (18,)).tolist()
    rows = [(" ".join(some_words(n)), ["bad", "good", "so"][n % 3]) for n in lengths]
    write_csv(root / "data.csv", ("text", "label"), rows)
    killed = wanted(request, "name")
    lanes = {name: deaths for name, deaths in LANES.items() if name in killed or deaths == [None]}
    plan = []
    for name, deaths in lanes.items():
        command = ["tune", str(root / "bert"), "--data", str(root / "data.csv"), *STEPS]
        command += ["--out", str(root / name), *(OTHERS if "otherwise" in name else [])]
        for i, death in enumerate(deaths):
            plan.append([[*command, *["--resume"][: i > 0]], death, str(root / f"{name}.log")])
    (root / "plan.json").write_text(json.dumps(plan))
    script = Path(__file__).with_name("tune_processes.py")
    done = subprocess.run(
        [sys.executable, str(script), str(root / "plan.json")],
        env={**os.environ, "HF_HOME": str(root / "cache"), "OMP_NUM_THREADS": "1"},
        cwd=root, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    codes = iter(json.loads(done.stdout))
    return {
        name: SimpleNamespace(
            folder=root / name,
            log=(root / f"{name}.log").read_text(),
            codes=[next(codes) for _ in deaths],
        )
        for name, deaths in lanes.items()
    }


@pytest.mark.parametrize("name", [name for name in LANES if "not at all" not in name])
def test_a_killed_run_ends_with_the_same_bits(name, lanes):
    whole = lanes["not at all, otherwise" if "otherwise" in name else "not at all"]
    killed = lanes[name]
    expected = {None: 0, "interrupt": 130}
    assert killed.codes == [expected.get(death and death[0], -9) for death in LANES[name]]
    assert contents(killed.folder) == contents(whole.folder)
    metrics = [(lane.folder / "metrics.jsonl").read_text() for lane in (killed, whole)]
    assert metrics[0] == metrics[1]
    names = [{path.name for path in lane.folder.iterdir()} for lane in (killed, whole)]
    assert names[0] == names[1]  # nothing is left over


def test_the_recipe_refits_and_finishes(lanes):
    run = lanes["not at all, otherwise"]
    settings = json.loads((run.folder / "config.json").read_text())["settings"]
    assert settings["refit_rows"] == 8
    assert settings["tuning"]["detach_deviation"] is True
    assert settings["tuning"]["finish_bits"] == [16, 8, 6]
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    logs = [json.loads(line) for line in lines]
    assert [log["step"] for log in logs if log["alpha"] == 0] == list(range(5, 16))
    assert all("loss_out" not in log for log in logs[5:])


def test_a_run_refits_before_its_first_step(command, tmp_path):
    whole = ["--batch-size", 8]  # the range is measured on the first batch
    still = ["--refit-rows", 8, "--learning-rate", 0, "--trainer", "weight_decay=0", *whole]
    assert tune(*command, *still).exit_code == 0
    arguments = [*command[:3], "--out", tmp_path / "refit", *whole]
    assert run("refit", *arguments).exit_code == 0
    tuned, refitted = (
        load_file(tmp_path / name / "model.safetensors") for name in ("run/model", "refit")
    )
    start = load_file(f"{command[0]}/model.safetensors")
    assert any(not torch.equal(tuned[name], start[name]) for name in start)
    for name, value in refitted.items():  # of the same rows, in another order
        torch.testing.assert_close(tuned[name], value, rtol=1e-3, atol=1e-5)


def test_an_uninterrupted_run_writes_what_it_is_made_of(lanes):
    run = lanes["not at all"]
    assert run.codes == [0], run.log
    assert {path.name for path in run.folder.iterdir()} == {
        "config.json", "environment.json", "metrics.jsonl", "checkpoint-12", "checkpoint-15",
        "model",
    }  # fmt: skip
    config = json.loads((run.folder / "config.json").read_text())
    assert config["settings"]["learning_rate"] == 1e-3
    assert config["data"]["rows"] == 18
    assert config["training_arguments"]["max_steps"] == 15
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    logs = [json.loads(line) for line in lines]
    assert [log["step"] for log in logs] == list(range(1, 16))
    assert [log["alpha"] for log in logs] == pytest.approx(
        [0.5 * (1 - s / 15) for s in range(1, 16)]
    )
    assert all(after["learning_rate"] < before["learning_rate"] for before, after in pairwise(logs))
    moved = load_file(run.folder / "model" / "model.safetensors")
    start = load_file(run.folder.parent / "bert" / "model.safetensors")
    assert any(not torch.equal(moved[key], start[key]) for key in start if "query" in key)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("before the first checkpoint, otherwise", "going on from the start"),
        ("between two checkpoints", "going on from checkpoint-6"),
        ("with a checkpoint half written", "checkpoint-12 is not complete: skipped and removed"),
        ("with a checkpoint not marked", "checkpoint-9 is not complete: skipped and removed"),
        ("with a checkpoint not marked", "going on from checkpoint-6"),
        ("before the model has its name", "going on from checkpoint-15"),
        ("three times", "interrupted. To go on from the newest checkpoint: quanttune tune"),
    ],
)
def test_it_says_where_it_goes_on(name, text, lanes):
    assert text in lanes[name].log


# ------------------------------------------------------------------ what is trained


@pytest.mark.parametrize("case", LOADERS)
def test_a_step_is_that_of_a_plain_loop(case, tmp_path, cache):
    data, rows, batch = case(tmp_path)
    result = tune(
        tmp_path / "model", "--data", tmp_path / data, "--out", tmp_path / "run", "--steps", 1,
        "--batch-size", rows, "--learning-rate", 0.1, "--alpha", 0.3, "--tokens",
        5 if case is opt_case else 16, "--trainer", "optim=sgd", "--trainer", "max_grad_norm=0",
        "--trainer", "lr_scheduler_type=constant", "--trainer", "use_cpu=true",
        "--json", tmp_path / "outcome.json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    model = getattr(transformers, LOADERS[case]).from_pretrained(tmp_path / "model").train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    tuner = constant(model, 0.3)
    loss = tuner.combine(model(**batch).loss)
    loss.backward()
    trained = type(model).from_pretrained(tmp_path / "run" / "model")
    after = dict(trained.named_parameters())
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    moved = {name: (before[name] - after[name].detach()) / 0.1 for name in expected}
    assert_near(moved, expected, 1e-4)  # a float32 parameter minus a small step
    outcome = json.loads((tmp_path / "outcome.json").read_text())
    assert outcome["last"]["loss"] == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("option", ["--bf16", "--activation-checkpointing"])
def test_a_cheaper_step_is_that_of_a_plain_loop(option, tmp_path, cache):
    data, rows, batch = bert_case(tmp_path)
    result = tune(
        tmp_path / "model", "--data", tmp_path / data, "--out", tmp_path / "run", "--steps", 1,
        "--batch-size", rows, "--learning-rate", 0.1, "--alpha", 0.3, "--tokens", 16, option,
        "--trainer", "optim=sgd", "--trainer", "max_grad_norm=0",
        "--trainer", "lr_scheduler_type=constant",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    model = BertForSequenceClassification.from_pretrained(tmp_path / "model").train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.autocast("cpu", torch.bfloat16, enabled=option == "--bf16"):
        loss = constant(model, 0.3).combine(model(**batch).loss)
    loss.backward()
    trained = BertForSequenceClassification.from_pretrained(tmp_path / "run" / "model")
    moved = {name: (before[name] - p.detach()) / 0.1 for name, p in trained.named_parameters()}
    expected = {name: p.grad for name, p in model.named_parameters()}
    assert_near(moved, expected, 1e-4)  # a float32 parameter minus a small step
    arguments = json.loads((tmp_path / "run" / "config.json").read_text())["training_arguments"]
    assert arguments[option.removeprefix("--").replace("-", "_")] is True


def config_of(*names, architecture="ViTForImageClassification"):
    return SimpleNamespace(
        id2label=dict(enumerate(names)),
        num_labels=len(names),
        architectures=[architecture],
        model_type="vit",
    )


@pytest.mark.parametrize(
    ("known", "labels", "numbered", "classes"),
    [
        (["Cat", "Dog", "Ant"], ["ant", "cat"], False, [2, 0]),
        (["Cat", "Dog"], ["cat", "cow"], False, []),
        (["LABEL_0", "LABEL_1"], ["bad", "good"], False, [0, 1]),
        (["LABEL_0", "LABEL_1", "LABEL_2"], ["bad", "good"], False, []),
        (["Cat", "Dog", "Ant"], ["0", "1"], True, [0, 1]),
        (["Cat", "Dog"], ["0", "1", "2"], True, []),
        (["crane", "cat", "crane"], ["crane", "cat", "crane"], False, [0, 1, 2]),
        (["crane", "cat", "crane"], ["cat"], False, []),
        (["1", "0"], ["0", "1"], True, [1, 0]),  # numbers that are names
        (["1 star", "2 stars"], ["1", "2"], True, []),
        (["LABEL_0", "LABEL_1", "LABEL_2"], ["0", "2"], True, [0, 2]),
        (["LABEL_0", "LABEL_1"], ["1", "2"], True, [0, 1]),
        # two of ImageNet's classes, by their ids
        ([f"class {i}" for i in range(1000)], ["n01443537", "n01440764"], False, [1, 0]),
    ],
)
def test_labels_are_matched(known, labels, numbered, classes):
    assert match_labels(config_of(*known), "image-classification", labels, numbered) == classes


def test_a_model_for_something_else_gets_a_new_head():
    config = config_of("LABEL_0", "LABEL_1", architecture="ViTForMaskedImageModeling")
    assert match_labels(config, "image-classification", ["a", "b"], False) == []


def test_names_of_timm_become_ids_of_their_weights(tmp_path):
    expected = "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    assert resolve("vit_tiny_patch16_224") == resolve("timm/vit_tiny_patch16_224") == expected
    assert resolve("google-bert/bert-base-uncased") == "google-bert/bert-base-uncased"
    assert resolve(str(tmp_path)) == str(tmp_path)


# ------------------------------------------------------------------ what is refused


def test_a_dry_run_checks_and_writes_nothing(command, tmp_path):
    result = tune(*command, "--dry-run")
    assert "text-classification: BertForSequenceClassification on 8 rows" in result.output
    assert "16 tokens at most: the model takes no more" in result.output
    assert not (tmp_path / "run").exists()


def test_a_finished_run_is_left_alone(command, tmp_path):
    assert tune(*command).exit_code == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    result = tune(*command, "--resume")
    assert "is finished: nothing is left to do" in result.output
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    with pytest.raises(ValueError, match="holds a run: go on with it by --resume"):
        tune(*command)
    with pytest.raises(
        ValueError, match=r"settings\.seed was 0, is 1; settings\.tuning\.alpha was"
    ):
        tune(*command, "--resume", "--seed", 1, "--alpha", 0.3)


def test_other_data_are_refused(command, tmp_path):
    assert tune(*command).exit_code == 0
    for path in sorted((tmp_path / "run" / "model").iterdir()):
        path.unlink()
    (tmp_path / "run" / "model").rmdir()
    rows = [(f"w{i} w2", i % 5) for i in range(8)]
    write_csv(tmp_path / "data.csv", ("text", "label"), rows)
    with pytest.raises(ValueError, match=r"data\.fingerprint was"):
        tune(*command, "--resume")


def test_a_folder_of_something_else_is_refused(command, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("")
    for arguments in ([], ["--resume"]):
        with pytest.raises(ValueError, match=r"is not empty and holds no run \(thesis\.tex\)"):
            tune(*command, *arguments)


def test_a_checkpoint_that_lost_a_file_is_skipped(command, tmp_path):
    assert tune(*command, "--save-steps", 1).exit_code == 0
    run = tmp_path / "run"
    finished = contents(run)
    (run / "model").rename(tmp_path / "model")
    (run / "checkpoint-2" / "optimizer.pt").unlink()
    environment = json.loads((run / "environment.json").read_text())
    (run / "environment.json").write_text(json.dumps({**environment, "threads": 77}))
    result = tune(*command, "--save-steps", 1, "--resume")
    assert "checkpoint-2 is not complete" in result.output
    assert "going on from checkpoint-1" in result.output
    assert "the last bits may differ: threads was 77, is" in result.output
    assert contents(run) == finished


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trainer", "warm_steps=3"], "no field 'warm_steps': did you mean warmup_steps"),
        (["--trainer", "warmup_steps"], "--trainer takes KEY=VALUE"),
        (["--trainer", "warmup_steps=few"], "argument --warmup_steps.*: invalid float value"),
        (["--trainer", "seed=3"], "has an option of its own: --seed"),
        (["--trainer", "save_only_model=true"], "leaves out what --resume needs"),
        (["--trainer", "save_total_limit=1"], "save_total_limit must be 2 or more, got 1"),
        (["--steps", "0"], "steps must be 1 or more, got 0"),
        (["--alpha", "2"], "alpha must be from 0 to 1"),
        (["--balance", "some"], "--balance must be one of none, initial, got 'some'"),
        (["--loss", "ratios"], "--loss must be one of ratio, .*, got 'ratios'"),
        (["--decay", "slow"], "decay must be one of linear"),
        (["--observe-every", "0"], "observe_every must be at least 1"),
        (["--detach-deviation", "--loss", "kurtosis"], "detach_deviation=True is for losses of"),
        (["--include", "nothing"], "no Linear, Conv1D or LayerNorm"),
        (["--task", "regression"], "task must be one of text-classification"),
        (["--label", "grade"], "has no column grade: it has text, label"),
        (["--text", "text", "--text", "text", "--text", "text"], "say which with --text"),
        (["--text", "label"], r"column 'label' holds no text: text \(.*string\), label \(int64\)"),
        (["--task", "image-classification"], "no column holds images"),
        (["--subset", "sst2"], "a data file has no subsets, got 'sst2'"),
        (["--split", "test"], "test"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    arguments, message, command, tmp_path
):
    with pytest.raises(ValueError, match=message):
        tune(*command, *arguments)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("w1", 0.5), ("w2", 1.5)], "labels must be names, or whole numbers from 0, got"),
        ([("w1", -1), ("w2", -1)], "whole numbers from 0, got \\['-1'\\].*-1 stands for no label"),
        ([("w1", "a"), ("w2", ""), ("w3", "")], "'label' is empty in row 2, and in 1 more: give"),
        ([("w1", 0), ("w2", 1), ("w3", "")], "column 'label' is empty in row 3: give"),
        ([("w1", 0), ("w2", 0)], "has one label only"),
        ([("w1", 0), ("", 1)], "column 'text' has rows without a text"),
        ([], "no data"),
    ],
)
def test_data_that_do_not_fit_are_refused(rows, message, command, tmp_path):
    write_csv(tmp_path / "data.csv", ("text", "label"), rows)
    with pytest.raises(ValueError, match=message):
        tune(*command)


def test_a_file_of_another_kind_is_refused(command, tmp_path):
    (tmp_path / "data.xls").write_text("")
    with pytest.raises(ValueError, match=r"one of \.csv, .*, got data\.xls"):
        tune(*command, "--data", tmp_path / "data.xls")


def test_a_model_that_does_not_tell_its_task_needs_it(command, bert):
    config = json.loads((bert / "config.json").read_text())
    (bert / "config.json").write_text(json.dumps({**config, "architectures": ["BertModel"]}))
    with pytest.raises(ValueError, match="names BertModel, which does not tell the task"):
        tune(*command)
    assert "a new head for 5 labels" in tune(*command, "--task", "text-classification").output


def test_several_gpus_are_refused(command, monkeypatch):
    monkeypatch.setattr(transformers.TrainingArguments, "n_gpu", 2)
    with pytest.raises(ValueError, match=r"2 GPUs .*: start a process for each .*DEVICES=0"):
        tune(*command)
