"""`quanttune reproduce` on small stand-ins of each data set, with tiny models."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from statistics import fmean

import datasets
import numpy as np
import pytest
import timm
import torch
import transformers
from cases import run, save_tokenizer, some_words
from models import MODELS
from PIL import Image
from safetensors.torch import load_file
from test_evaluate_command import LETTERS, plain_last_words, write_last_words
from timm.data import create_transform, resolve_data_config
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

import quanttune as qt
from quanttune.jobs.reproduction import arms, cells, figures, random_weights
from quanttune.jobs.reproduction.inputs import load_inputs
from quanttune.jobs.reproduction.published import published
from quanttune.jobs.reproduction.tables import TABLES
from quanttune.jobs.settings import Settings

NAMES = ["ant", "bee", "cat"]


@pytest.fixture(autouse=True)
def _cache(cache):
    """Keep what `datasets` makes out of the user's cache."""


@pytest.fixture
def photos(tmp_path):
    """Return a folder of images as that of ImageNet, and a tiny ViT for them."""
    pixels = np.random.default_rng(0).integers(0, 256, (42, 16, 16, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        folder = tmp_path / "photos" / ("train" if i < 24 else "val") / NAMES[i % 3]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{i:02}.png")
    shape = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 2}
    config = TimmWrapperConfig(
        architecture="vit_tiny_patch16_224",
        model_args=shape,
        id2label=dict(enumerate(NAMES)),
        label2id={name: i for i, name in enumerate(NAMES)},
        pretrained_cfg={"input_size": (3, 16, 16), "mean": (0.5,) * 3, "std": (0.5,) * 3,
                        "crop_pct": 1.0, "interpolation": "bicubic"},
    )  # fmt: skip
    model = TimmWrapperForImageClassification(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:  # those of a fresh model are small: all rounds to little
            torch.nn.init.normal_(parameter, 0, parameter.shape[-1] ** -0.5)
    model.save_pretrained(tmp_path / "vit")
    return tmp_path / "photos"


def table1(photos, *more, out="out"):
    out = photos.parent / out
    given = ["--data", photos, "--models", "deit_tiny"]
    given += ["--checkpoint", f"deit_tiny={photos.parent / 'vit'}"]
    return out, run("reproduce", "table1", *given, "--out", out, *more)


def cells_of(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def figure(out, row, width, panel=0):
    results = json.loads((out / "results.json").read_text())
    (found,) = [line for line in results["panels"][panel]["rows"] if line["name"] == row]
    return found["figures"][width]


def batch_of(folder):
    """Return the images of a folder of classes, sorted by class and name, and their labels."""
    paths = sorted(folder.glob("*/*.png"))
    pixels = torch.tensor(np.stack([np.asarray(Image.open(path)) for path in paths]))
    labels = torch.tensor([NAMES.index(path.parent.name) for path in paths])
    return (pixels.permute(0, 3, 1, 2) / 255 - 0.5) / 0.5, labels


@torch.no_grad()
def accuracy(model, images, labels):
    return 100 * (model(images).logits.argmax(-1) == labels).double().mean().item()


def test_every_row_of_table_1(photos):
    out, said = table1(photos, "--limit", 18, "--steps", 2, "--batch-size", 6)
    found = cells_of(out)
    assert [cell for cell in found if cell["refused"]] == []
    ways = [*TABLES["table1"].ways[:-1], "quanttune_0.3", "quanttune_0.5", "quanttune_0.7"]
    assert {cell["way"] for cell in found} == {*ways}
    tuned = {"control", "clipped_softmax", "gated_attention", *ways[-3:]}
    for way in ways[1:]:
        widths = [cell["bits"] for cell in found if cell["way"] == way]
        assert widths == ([32, 8, 7, 6] if way in tuned else [8, 7, 6])
    images, labels = batch_of(photos / "val")
    model = TimmWrapperForImageClassification.from_pretrained(photos.parent / "vit").eval()
    baseline = figure(out, "baseline", "float")
    assert baseline["mean"] == pytest.approx(accuracy(model, images, labels))
    assert baseline["published"] == "72.21"
    assert baseline["difference"] == pytest.approx(baseline["mean"] - 72.21)
    assert figure(out, "ptq4vit_strict", "W8A8")["published"] == ""  # of ViT-S and ViT-B alone
    assert figure(out, "fq_vit", "W8A8")["published"] == "71.61†"
    chosen = figure(out, "quanttune", "W7A7")
    some = [c for c in found if c["way"].startswith("quanttune") and c["bits"] == 7]
    best = max(some, key=lambda cell: cell["held_out"]["accuracy"])
    assert chosen["mean"] == best["values"]["accuracy"]
    page = (out / "report.html").read_text()
    run("report", out / "results.json", "--out", out / "again.html")
    assert (out / "again.html").read_text() == page
    for text in ("Quantizable: clipped softmax", "70.26", "†: from another paper", "A trial"):
        assert text in page
        assert text in (out / "table.md").read_text()
        assert text in said.output


def rows_drawn(count, seed, some):
    return (
        datasets.Dataset.from_dict({"row": range(count)}).shuffle(seed).select(range(some))["row"]
    )


@pytest.mark.parametrize(
    ("way", "scheme"), [("percentile", "percentile_ema"), ("omse_affine", "omse")]
)
def test_figures_are_those_of_plain_loops(way, scheme, photos):
    """Of 24 training rows 22 are learned from; 12 of these, in ten batches, give the ranges."""
    options = ["--methods", way, "--bits", "5,8", "--seeds", 2, "--calibration", 12]
    out, _ = table1(photos, *options)
    images, labels = batch_of(photos / "val")
    learned = batch_of(photos / "train")[0][list(rows_drawn(24, 0, 22))]
    expected = []
    for seed in range(2):
        model = TimmWrapperForImageClassification.from_pretrained(photos.parent / "vit").eval()
        ranges = learned[list(rows_drawn(22, seed, 12))].split(2)
        symmetric = way != "omse_affine"
        qt.quantize(model, 5, data=ranges, calibrator=scheme, symmetric=symmetric)
        expected.append(accuracy(model, images, labels))
    assert expected == pytest.approx(
        [cell["values"]["accuracy"] for cell in cells_of(out) if cell["bits"] == 5]
    )
    found = figure(out, way, "W5A5")
    assert found["seeds"] == 2
    assert found["mean"] == pytest.approx(fmean(expected))
    assert found["deviation"] == pytest.approx(np.std(expected, ddof=1))


def test_tuned_models_are_those_of_tune_and_kept(photos):
    """An arm is a run of `quanttune tune`, whose checkpoints go; the last row chooses by width."""
    options = ["--methods", "control,quanttune", "--bits", 8, "--alphas", 0.5, "--steps", 3]
    out, _ = table1(photos, *options, "--batch-size", 8)
    folder = out / "models" / "deit_tiny" / "imagenet"
    assert sorted(path.name for path in folder.iterdir()) == [
        "control-seed0",
        "quanttune_0.5-seed0",
    ]
    images, labels = batch_of(photos / "val")
    for name, alpha in (("control", 0.0), ("quanttune_0.5", 0.5)):
        run_folder = folder / f"{name}-seed0"
        told = json.loads((run_folder / "config.json").read_text())["settings"]
        assert (told["tuning"], told["steps"]) == ({"alpha": alpha}, 3)
        assert not [*run_folder.glob("checkpoint-*")]
        model = TimmWrapperForImageClassification.from_pretrained(run_folder / "model").eval()
        assert figure(out, name, "float")["mean"] == pytest.approx(accuracy(model, images, labels))


@pytest.mark.parametrize("way", ["clipped_softmax", "gated_attention"])
def test_quiet_attention_is_tuned_with_and_measured_with(way, photos):
    options = ["--methods", way, "--bits", 8, "--steps", 2, "--batch-size", 8, "--epochs", 1]
    out, _ = table1(photos, *options, "--learning-rate", 0.1)
    run_folder = out / "models" / "deit_tiny" / "imagenet" / f"{way}-seed0"
    images, labels = batch_of(photos / "val")
    model = TimmWrapperForImageClassification.from_pretrained(photos.parent / "vit").eval()
    change = {"clipped_softmax": qt.clip_softmax, "gated_attention": qt.gate_attention}[way]
    change(model)
    state = load_file(run_folder / "model" / "model.safetensors")
    assert model.load_state_dict(state, strict=True)
    assert any("head_gates" in name for name in state) == (way == "gated_attention")
    assert figure(out, way, "float")["mean"] == pytest.approx(accuracy(model, images, labels))


def test_a_model_without_such_attention_has_the_reason_there(photos, monkeypatch):
    def refused(model):
        raise ValueError("SwinTransformer has none of Attention")

    monkeypatch.setitem(arms.CHANGES, "clipped_softmax", refused)
    out, said = table1(photos, "--methods", "minmax,clipped_softmax", "--bits", 8)
    assert "left out, SwinTransformer has none of Attention" in said.output
    assert figure(out, "clipped_softmax", "W8A8")["mean"] is None
    assert "clipped_softmax: SwinTransformer has none" in (out / "table.md").read_text()


# ------------------------------------------------------------------ a run that was stopped


MIXED = ["--methods", "baseline,minmax,omse,control", "--bits", "8,6", "--steps", 2]


def without_times(cells):
    return [{**cell, "seconds": None} for cell in cells]


def test_a_stopped_run_ends_with_the_same_figures(photos, monkeypatch):
    stop = 3
    whole, _ = table1(photos, *MIXED, out="whole")
    measured, count = cells.Bench._cell, iter(range(100))

    def stopping(*args):
        if next(count) == stop:
            raise KeyboardInterrupt
        return measured(*args)

    monkeypatch.setattr(cells.Bench, "_cell", stopping)
    out, said = table1(photos, *MIXED)
    assert "interrupted. To go on: quanttune" in said.output
    assert len(cells_of(out)) == stop
    monkeypatch.setattr(cells.Bench, "_cell", measured)
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"model": "deit_t')  # as a kill in the middle of a line leaves it
    seen = []
    monkeypatch.setattr(
        cells.Bench,
        "_cell",
        lambda self, key, *args: seen.append(key) or measured(self, key, *args),
    )
    table1(photos, *MIXED, "--resume")
    assert len(seen) == 8 - stop
    assert without_times(cells_of(out)) == without_times(cells_of(whole))
    assert (out / "table.md").read_text() == (whole / "table.md").read_text()


def test_a_killed_process_goes_on(photos):
    """SIGKILL at the first cell that is done; the rest is measured by the next command."""
    out = photos.parent / "out"
    command = [
        sys.executable, "-m", "quanttune.cli", "reproduce", "table1", "--data", photos, "--models",
        "deit_tiny", "--checkpoint", photos.parent / "vit", "--out", out, *MIXED,
    ]  # fmt: skip
    with subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            if (out / "metrics.jsonl").exists() and (out / "metrics.jsonl").stat().st_size:
                process.kill()
            time.sleep(0.01)
    begun = (out / "metrics.jsonl").read_text()
    assert begun
    table1(photos, *MIXED, "--resume")
    assert (out / "metrics.jsonl").read_text().startswith(begun)
    whole, _ = table1(photos, *MIXED, out="whole")
    assert without_times(cells_of(out)) == without_times(cells_of(whole))


def test_a_finished_run_takes_more(photos):
    out, _ = table1(photos, "--methods", "minmax", "--bits", 8)
    first = cells_of(out)
    with pytest.raises(ValueError, match="holds a run: go on with it by --resume"):
        table1(photos, "--methods", "ema", "--bits", 8)
    table1(photos, "--methods", "ema", "--bits", "8,6", "--resume")
    assert cells_of(out)[:1] == first
    rows = json.loads((out / "results.json").read_text())["panels"][0]["rows"]
    assert [row["name"] for row in rows] == ["minmax", "ema"]
    assert figure(out, "minmax", "W6A6")["mean"] is None


def test_other_settings_and_rows_are_refused(photos):
    table1(photos, "--methods", "minmax", "--bits", 8)
    with pytest.raises(ValueError, match=r"begun otherwise: request\.calibration was None, is 9"):
        table1(photos, "--methods", "minmax", "--resume", "--calibration", 9)
    (photos / "val" / "ant" / "24.png").rename(photos / "val" / "bee" / "99.png")
    with pytest.raises(ValueError, match="has figures of DeiT-Tiny on ImageNet of other rows"):
        table1(photos, "--methods", "ema", "--resume")


# ------------------------------------------------------------------ what a newcomer may do


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--models", "deit_huge"], "--models must be of vit_small, .*, got 'deit_huge'"),
        (["--methods", "magic"], "--methods must be of baseline, minmax, .*, got 'magic'"),
        (["--bits", "eight"], "--bits takes whole numbers, got 'eight'"),
        (["--bits", "1"], "bits must be"),
        (["--alphas", "2"], "alpha must be"),
        (["--data", "nowhere/at/all.csv"], "there is no file or folder nowhere"),
        (["--epochs", "0"], "--epochs must be above 0"),
        (["--checkpoint", "swin_huge=x"], "--checkpoint must be of vit_small"),
        (["--checkpoint", "x"], "there is no model x"),
    ],
)
def test_what_cannot_be_is_told_before_the_work(options, message, photos):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        table1(photos, *options)
    assert not (photos.parent / "out" / "metrics.jsonl").exists() or not cells_of(
        photos.parent / "out"
    )


def test_without_weights_it_says_where_to_get_them(photos):
    with pytest.raises(
        ValueError, match=r"hf download timm/vit_small.*--checkpoint vit_small="
    ) as e:
        run("reproduce", "table1", "--data", photos, "--models", "vit_small", "--out", photos / "o")
    assert "--random-weights" in str(e.value)


def test_a_command_that_failed_at_once_leaves_its_folder_free(photos):
    with pytest.raises(ValueError, match="there is no model x"):
        table1(photos, "--methods", "minmax", "--checkpoint", "deit_tiny=x")
    out, _ = table1(photos, "--methods", "minmax", "--bits", 8, "--calibration", 9)
    assert len(cells_of(out)) == 1
    with pytest.raises(ValueError, match="holds a run"):  # it has a figure now
        table1(photos, "--methods", "minmax", "--bits", 8)
    (photos.parent / "tuned").mkdir()
    (photos.parent / "tuned" / "config.json").write_text('{"settings": {"steps": 3}}')
    (photos.parent / "tuned" / "metrics.jsonl").touch()
    with pytest.raises(ValueError, match="holds a run"):  # of another verb
        table1(photos, "--methods", "minmax", out="tuned")


def test_an_empty_folder(tmp_path, photos):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty doesn't contain any data files"):
        table1(photos, "--data", tmp_path / "empty")


def test_other_classes_than_those_of_the_model(photos):
    (photos / "val" / "cat").rename(photos / "val" / "owl")
    with pytest.raises(ValueError, match=r"the labels of the data .* are not those of the"):
        table1(photos, "--methods", "baseline")


def test_images_without_folders_of_classes(photos):
    for path in photos.glob("val/*/*.png"):
        path.rename(photos / "val" / path.name)
    with pytest.raises(ValueError, match=r"val must have a folder for each class .* found 24.png"):
        table1(photos, "--methods", "baseline")


def test_a_folder_without_training_rows_gives_half_of_them(photos):
    (photos / "train").rename(photos.parent / "elsewhere")
    out, said = table1(photos, "--methods", "baseline")
    assert "has no rows for training: half of those that would be measured" in said.output
    assert cells_of(out)[0]["rows"] == 9
    out, said = table1(
        photos, "--methods", "baseline", "--training-data", photos.parent / "elsewhere", out="o"
    )
    assert cells_of(out)[0]["rows"] == 18


def test_a_dry_run_counts_and_writes_nothing(photos):
    out, said = table1(photos, "--dry-run", "--bits", 8)
    assert "DeiT-Tiny, ImageNet: 18 rows to measure, 22 to learn from, 22 cells" in said.output
    assert not out.exists()


# ------------------------------------------------------------------ GLUE


def write_glue(folder):
    """Write files as those of GLUE, and a BERT without a head of its own for them."""
    for subset in ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte"):
        (folder / "glue" / subset).mkdir(parents=True)
        ends = ["_matched", "_mismatched"] if subset == "mnli" else [""]
        for split in ("train", *(f"validation{end}" for end in ends)):
            rows = []
            for i in range(30):
                label = i % 3 if subset == "mnli" else i / 6 if subset == "stsb" else i % 2
                row = {"sentence1": " ".join(some_words(4)), "label": label, "idx": i}
                if subset not in ("cola", "sst2"):
                    row["sentence2"] = " ".join(some_words(3))
                rows.append(json.dumps(row))
            (folder / "glue" / subset / f"{split}.jsonl").write_text("\n".join(rows))
    transformers.BertForMaskedLM(MODELS["bert"]().model.config).save_pretrained(folder / "bert")
    save_tokenizer(folder / "bert")


def table4(folder, *more):
    given = ["--data", folder / "glue", "--checkpoint", f"bert_base={folder / 'bert'}"]
    given += ["--out", folder / "out", "--steps", 2, "--batch-size", 8, "--tokens", 16]
    return folder / "out", run("reproduce", "table4", *given, *more)


def test_nine_tasks_of_glue_and_their_mean(tmp_path):
    write_glue(tmp_path)
    options = ["--methods", "baseline,minmax,control", "--bits", 8]
    out, said = table4(tmp_path, *options, "--learning-rate", 1e-2)
    found = cells_of(out)
    assert len(found) == 9 * 4
    metrics = {cell["task"]: [*cell["values"]] for cell in found}
    assert metrics["cola"] == ["matthews_correlation"]
    assert metrics["stsb"] == ["pearson"]
    assert {*map(tuple, metrics.values())} == {
        ("matthews_correlation",), ("pearson",), ("accuracy",),
    }  # fmt: skip
    values = {
        (cell["task"], cell["way"], cell["bits"]): value
        for cell in found
        for value in cell["values"].values()
    }
    for task in TABLES["table4"].tasks:  # the head is new, so the base is the control
        assert values[task, "baseline", 32] == values[task, "control", 32]
        assert values[task, "minmax", 8] == values[task, "control", 8]
    for way, width, bits in (("baseline", "float", 32), ("minmax", "W8A8", 8)):
        mean = fmean(values[task, way, bits] for task in TABLES["table4"].tasks)
        assert figure(out, way, width, panel=-1)["mean"] == pytest.approx(mean)
    assert figure(out, "baseline", "float", panel=-1)["published"] == "81.25"
    assert {path.name for path in (out / "models" / "bert_base").iterdir()} == {
        "cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte",
    }  # fmt: skip
    assert "| Min-max" in said.output
    model = transformers.BertForSequenceClassification.from_pretrained(
        out / "models" / "bert_base" / "stsb" / "control-seed0" / "model"
    ).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "bert")
    rows = list(map(json.loads, (tmp_path / "glue/stsb/validation.jsonl").read_text().splitlines()))
    with torch.no_grad():
        scores = [
            model(
                **tokenizer(row["sentence1"], row["sentence2"], return_tensors="pt")
            ).logits.item()
            for row in rows
        ]
    expected = 100 * np.corrcoef(scores, [row["label"] for row in rows])[0, 1]
    assert values["stsb", "control", 32] == pytest.approx(expected, abs=0.05)


def test_what_is_unreadable_in_the_paper_stays_so(tmp_path):
    write_glue(tmp_path)
    out, said = table4(
        tmp_path, "--tasks", "sst2,rte", "--methods", "baseline,percentile", "--bits", "8,6"
    )
    assert figure(out, "percentile", "W8A8")["published"] == "unreadable"
    assert figure(out, "percentile", "W8A8")["difference"] is None
    lost = figure(out, "unassigned", "W8A8")
    assert (lost["mean"], lost["published"], lost["seeds"]) == (None, "88.65?", 0)
    assert "OMSE, min-max or percentile" in said.output
    assert "?: read from a garbled table, a guess" in (out / "report.html").read_text()
    results = json.loads((out / "results.json").read_text())
    assert [panel["task"] for panel in results["panels"]] == ["sst2", "rte"]  # no mean of two


def test_a_missing_subset_says_what_is_wanted(tmp_path):
    write_glue(tmp_path)
    (tmp_path / "glue" / "rte").rename(tmp_path / "rte")
    (tmp_path / "glue" / "README.md").write_text("How I made this.")
    with pytest.raises(ValueError, match="no folder rte: wanted are a copy of nyu-mll/glue, or a"):
        table4(tmp_path, "--tasks", "rte")
    (tmp_path / "glue" / "sst2" / "validation.jsonl").rename(tmp_path / "glue/sst2/dev.jsonl")
    with pytest.raises(ValueError, match="has the splits dev, train, and SST-2 is measured"):
        table4(tmp_path, "--tasks", "sst2", "--resume")


# ------------------------------------------------------------------ LAMBADA


@pytest.mark.filterwarnings("ignore:the outlier term's gradient norm")  # letters at random
def test_lambada_is_counted_both_ways(tmp_path):
    model, texts = write_last_words(tmp_path)
    (tmp_path / "texts").mkdir()
    (tmp_path / "lambada.jsonl").rename(tmp_path / "texts" / "test.jsonl")
    lines = [json.dumps({"text": " ".join(LETTERS[i:]), "domain": "Other"}) for i in range(20)]
    (tmp_path / "texts" / "train.jsonl").write_text("\n".join(lines))
    out = tmp_path / "out"
    run(
        "reproduce", "table3", "--data", tmp_path / "texts", "--checkpoint",
        f"opt_350m={tmp_path / 'model'}", "--models", "opt_350m", "--out", out, "--tokens", 12,
        "--steps", 2, "--bits", 8, "--limit", 30,
    )  # fmt: skip
    found = cells_of(out)
    assert [cell for cell in found if cell["refused"]] == []
    assert {cell["rows"] for cell in found} == {len(texts)}
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    expected, _ = plain_last_words(model, tokenizer, texts, 12)
    baseline = found[0]["values"]
    assert baseline == pytest.approx(expected)
    assert 0 < baseline["last_word"] < baseline["last_token"]
    for panel, metric in enumerate(("last_token", "last_word")):
        assert figure(out, "baseline", "float", panel)["mean"] == baseline[metric]
        assert figure(out, "minmax", "W8A8", panel)["published"] == "58.29~"
        assert figure(out, "percentile", "W8A8", panel)["published"] == "8.85?"


# ------------------------------------------------------------------ published figures


def test_the_averages_of_table_1_are_those_that_the_paper_prints():
    printed = {
        ("baseline", 32): 81.45, ("minmax", 8): 32.77, ("ema", 8): 35.30, ("percentile", 8): 47.10,
        ("omse", 8): 65.33, ("quanttune", 8): 77.42, ("minmax", 7): 7.30, ("ema", 7): 7.67,
        ("percentile", 7): 10.66, ("omse", 7): 34.95, ("quanttune", 7): 68.75,
    }  # fmt: skip
    for (row, bits), mean in printed.items():
        values = [
            published()["table1", model, "imagenet", row, bits].value
            for model in TABLES["table1"].models
        ]
        assert abs(fmean(values) - mean) <= 0.0051


def test_every_published_figure_stands_in_a_table():
    for (table, model, task, row, bits), figure in published().items():
        assert model in TABLES[table].models
        assert task in {*TABLES[table].tasks, "glue"}
        assert row in {*TABLES[table].ways, "unassigned"}
        assert bits in (32, 8, 7, 6)
        assert figure.source
        assert (figure.value is None) == (figure.text in ("", "-"))


# ------------------------------------------------------------------ models without a download


@pytest.mark.parametrize(
    ("table", "model", "options"),
    [
        ("table4", "bert_base", ["--tasks", "cola"]),
        ("table3", "opt_350m", []),
    ],
)
def test_random_weights_are_drawn_once(table, model, options, tmp_path, monkeypatch):
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 40}
    bert = {**sizes, "hidden_size": 16, "intermediate_size": 16, "vocab_size": 8000}
    opt = {**random_weights.OPT_350M, **sizes, "hidden_size": 16, "word_embed_proj_dim": 16}
    monkeypatch.setattr(random_weights, "BERT_BASE", {**random_weights.BERT_BASE, **bert})
    monkeypatch.setattr(random_weights, "OPT_350M", {**opt, "ffn_dim": 16, "vocab_size": 8000})
    write_glue(tmp_path)
    lines = [json.dumps({"text": " ".join(some_words(9))}) for _ in range(40)]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    data = tmp_path / ("glue" if table == "table4" else "texts.jsonl")
    given = ["reproduce", table, "--data", data, "--random-weights", "--out", tmp_path / "out"]
    given += ["--methods", "baseline,minmax", "--steps", 1, "--tokens", 12, *options]
    said = run(*given, "--bits", 8)
    assert "The weights are random" in said.output
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/random").rglob("*.*")}
    assert before
    run(*given, "--bits", "8,6", "--resume")
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_pixels_are_those_of_timm(photos):
    name = "deit_tiny_patch16_224.fb_in1k"
    settings = Settings(name, str(photos), task="image-classification", batch_size=18)
    random_weights.write_random(replace(settings, split="validation"), photos.parent / "deit")
    settings = replace(settings, model=str(photos.parent / "deit"))
    inputs = load_inputs(settings, TABLES["table1"].tasks["imagenet"], "", None)
    (batch,) = inputs.measured.batches(settings, inputs.measured.load_float(0))
    options = resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
    transform = create_transform(**options, is_training=False)
    expected = [transform(Image.open(path)) for path in sorted(photos.glob("val/*/*.png"))]
    assert torch.equal(batch["pixel_values"], torch.stack(expected))
    assert batch["labels"].tolist() == [0] * 6 + [1] * 6 + [2] * 6


# ------------------------------------------------------------------ figures


def test_figures_of_models_are_one_page(photos, monkeypatch):
    out = photos.parent / "figures"
    given = ["reproduce", "figures", "--data", photos, "--models", "deit_tiny", "--steps", 1]
    given += ["--checkpoint", photos.parent / "vit", "--out", out, "--calibration", 4]
    run(*given, "--limit", 8)
    (found,) = json.loads((out / "results.json").read_text())["analyses"]
    assert [one["name"] for one in found["models"]] == [
        "DeiT-Tiny", "Control (alpha 0)", "QuantTune, alpha 0.5",
    ]  # fmt: skip
    page = (out / "report.html").read_text()
    for number in range(2, 7):
        assert f"(Fig. {number})" in page
    monkeypatch.setattr(figures, "analyze", None)  # what is done is not done again
    run(*given, "--limit", 8, "--resume")
    assert (out / "report.html").read_text() == page
