"""`quanttune auto`: what it leaves in its folder, and that it does so again."""

import hashlib
import json
import os
import re
import shutil
import signal
from dataclasses import replace

import pytest
import torch
import transformers
from cases import contents, run, some_words, write_csv
from oracle import quiet

from quanttune.choosing import space, targets
from quanttune.choosing.targets import TARGETS
from quanttune.cli import auto as command
from quanttune.jobs.auto import auto
from quanttune.jobs.auto_rows import Request, load_parts
from quanttune.jobs.delivery import verdict
from quanttune.jobs.settings import Settings

pytestmark = quiet

COUNT, ROWS = 90, 24
FEW = ["--rows", ROWS, "--limit", 16, "--refit-rows", 16, "--batch-size", 8]
OF_TWO_BITS = ["--bits", 2, "--target", "torch"]


@pytest.fixture
def asked(bert, tmp_path, monkeypatch):
    """Return the arguments of a run, on rows whose labels are what the float model says."""
    monkeypatch.setattr(
        space, "METHOD_AXES", {"norms": ("", "smoothquant"), "rounding": ("", "bias_correction")}
    )
    monkeypatch.setattr(
        "quanttune.choosing.targets._TRIED", ("minmax", "percentile")
    )  # a search of seconds
    everything = replace(TARGETS["torch"], scheme=TARGETS["onnx-npu"].scheme, spares=False)
    monkeypatch.setattr(targets, "TARGETS", {**TARGETS, "torch": everything})
    texts = {" ".join(some_words(4 + i % 3)) for i in range(COUNT)}
    texts = sorted(texts)
    tokenizer = transformers.AutoTokenizer.from_pretrained(bert)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(bert).eval()
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        for weight in model.parameters():
            weight *= 8 if weight.dim() > 1 else 1  # else all rows are of one class
        model.classifier.bias -= model(**batch).logits.mean(0)
        said = model(**batch).logits.argmax(1)
    assert len(said.unique()) > 2
    model.save_pretrained(bert)
    write_csv(tmp_path / "data.csv", ("text", "label"), zip(texts, said.tolist(), strict=True))
    return [bert, "--data", tmp_path / "data.csv", *FEW]


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_it_leaves_a_model_a_file_a_page_and_a_recipe_that_does_it_again(asked, tmp_path):
    out, again = tmp_path / "out", tmp_path / "again"
    result = run("auto", *asked, "--bits", 4, "--drop", "100%", "--out", out)
    assert result.exit_code == 0, result.output
    assert "the drop is met: " in result.output
    names = ["auto.json", "model", "model.onnx", "recipe.json", "report.html", "metrics.jsonl"]
    assert all((out / name).exists() for name in names)
    found = json.loads((out / "auto.json").read_text())
    assert found["verdict"]["met"]
    assert found["file"]["problems"] == []
    assert found["values"]["test"]["float"] == found["values"]["validation"]["float"] == 100
    assert found["rows"] == {"learning": 16, "validation": ROWS, "test": ROWS}
    result = run("auto", "--recipe", out / "recipe.json", "--out", again)
    assert result.exit_code == 0, result.output
    assert contents(out) == contents(again)
    assert digest(out / "model.onnx") == digest(again / "model.onnx")
    repeated = json.loads((again / "auto.json").read_text())
    assert repeated["values"] == found["values"]
    page = run("report", out / "auto.json", "--out", tmp_path / "page.html")
    assert page.exit_code == 0
    html = (tmp_path / "page.html").read_text()
    assert html == (out / "report.html").read_text()
    assert all(text in html for text in ("What each step bought", "All that was tried", "minmax"))


def test_numbers_are_those_of_the_model_and_the_file_on_rows_it_never_saw(asked, tmp_path):
    out = tmp_path / "out"
    run("auto", *asked, *OF_TWO_BITS, "--drop", "100%", "--out", out)
    found = json.loads((out / "auto.json").read_text())
    told = json.loads((out / "recipe.json").read_text())
    settings = Settings(**{**told["settings"], "text": ()})
    parts = load_parts(settings, Request(**told["request"]))
    rows = {name: parts.__dict__[name].rows for name in ("learning", "validation", "test")}
    ids = [tuple(row["input_ids"]) for part in rows.values() for row in part]
    assert len(ids) == len(set(ids)) == 16 + 2 * ROWS
    model = transformers.AutoModelForSequenceClassification.from_pretrained(out / "model").eval()
    batch = parts.test.collate([parts.test.rows[i] for i in range(ROWS)])
    labels = batch.pop("labels")
    with torch.no_grad():
        right = model(**batch).logits.argmax(1) == labels
    assert found["values"]["test"]["quantized"] == 100 * int(right.sum()) / ROWS
    assert found["values"]["test"]["quantized"] < 100


def lines(folder):
    """Return what was tried, without how long it took."""
    texts = (folder / "metrics.jsonl").read_text().splitlines()
    return [re.sub(r'"seconds": [\d.e-]+', "", text) for text in texts]


@pytest.mark.parametrize("count", [0, 3])
def test_a_killed_run_goes_on_to_the_same_bits(asked, count, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    options = [*asked, *OF_TWO_BITS, "--drop", "0"]
    expected = run("auto", *options, "--out", whole)
    trials = (whole / "metrics.jsonl").read_text().splitlines(keepends=True)
    assert len(trials) > 4
    killed.mkdir()
    for name in ("config.json", "environment.json"):
        shutil.copy(whole / name, killed / name)
    (killed / "metrics.jsonl").write_text("".join(trials[:count]) + '{"point": {"cal')
    with pytest.raises(ValueError, match="go on with it by --resume"):
        run("auto", *options, "--out", killed)
    with pytest.raises(ValueError, match=r"request.drop was '0', is '5%'"):
        run("auto", *options[:-1], "5%", "--out", killed, "--resume")
    result = run("auto", *options, "--out", killed, "--resume")
    assert result.exit_code == expected.exit_code
    assert lines(killed) == lines(whole)
    assert contents(killed) == contents(whole)
    assert digest(killed / "recipe.json") == digest(whole / "recipe.json")


def test_a_drop_that_cannot_be_met_ends_with_the_closest_and_status_3(asked, tmp_path):
    out = tmp_path / "out"
    options = [*OF_TWO_BITS, "--drop", "0", "--out", out]
    result = run("auto", *asked, *options)
    assert result.exit_code == command.NOT_MET == 3
    assert "the drop is not met: no single choice improves it further" in result.output
    found = json.loads((out / "auto.json").read_text())
    best = max(trial["value"] for trial in found["tried"] if trial["parts"] == 8)
    assert found["steps"][-1]["value"] == pytest.approx(best, abs=5)
    assert not found["verdict"]["of"]["validation"]
    assert (out / "model.pt2").exists()


def test_an_interruption_ends_the_search_and_delivers_the_best(asked, tmp_path):
    settings = Settings(str(asked[0]), str(asked[2]), split=None, batch_size=8)
    request = Request("torch", "accuracy", "0", limit=16, refit_rows=16, rows=ROWS, bits=2)
    told = []

    def interrupted_once(what, done, total):
        told.append(what)
        if told.count("measuring") == 21:  # of the third candidate, the float model included
            told.extend(["measuring"] * 1000)
            raise KeyboardInterrupt

    found = auto(settings, request, tmp_path / "out", say=str, progress=interrupted_once)
    assert found["ended"] == "interrupted"
    assert len(found["tried"]) == 1
    assert (tmp_path / "out" / "model" / "config.json").exists()
    assert json.loads((tmp_path / "out" / "recipe.json").read_text())["recipe"] == found["recipe"]


def test_the_first_ctrl_c_is_for_the_search_alone(capsys):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with command._searching(lambda *told: None) as advance:
            advance("measuring", 0, 1)
            os.kill(os.getpid(), signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                advance("measuring", 1, 1)
            advance("calibrating", 0, 1)
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_choice_is_met_where_both_parts_of_the_rows_say_so():
    request = Request("torch", "perplexity", "10%")
    values = {"float": 20.0, "quantized": 21.0}
    worse = {"float": 30.0, "quantized": 34.0}
    found = verdict({"validation": values, "test": worse}, request)
    assert found["of"] == {"validation": True, "test": False}
    assert not found["met"]
    assert found["lost"] == {"validation": 1.0, "test": 4.0}
    assert found["gap"] == 3.0
    assert verdict({"validation": values, "test": values}, request)["met"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target", "tpu"], "--target must be one of onnx-cpu"),
        (["--target", "executorch", "--bits", 6], "executorch takes activations of 8 bits, got 6"),
        (["--drop", "some"], "drop must be such as"),
        (["--metric", "perplexity"], "a metric of text-classification is one of"),
        (["--metric", "accuracy", "--metric", "f1"], "chooses by one metric, got accuracy, f1"),
        (["--learning-split", "none"], "no split none, but train"),
        (["--minutes", "0"], "the time was up"),
    ],
)
def test_what_does_not_fit_is_refused(asked, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run("auto", *asked, *options, "--out", tmp_path / "out")


def test_a_recipe_wants_nothing_beside_it(asked, tmp_path):
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(ValueError, match="has model, data and all settings in its file: leave out"):
        run("auto", *asked, "--recipe", tmp_path / "a.json", "--out", tmp_path / "out")
    with pytest.raises(ValueError, match="is no recipe of quanttune auto"):
        run("auto", "--recipe", tmp_path / "a.json", "--out", tmp_path / "out")
    with pytest.raises(ValueError, match="give a model and --data, or --recipe"):
        run("auto", asked[0], "--out", tmp_path / "out")
    result = run("auto", *asked, "--dry-run", "--out", tmp_path / "out")
    assert f"rows: 16 learning, {ROWS} validation, {ROWS} test" in result.output
    assert not (tmp_path / "out").exists()
