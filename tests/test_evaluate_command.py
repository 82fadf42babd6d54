"""`quanttune calibrate` and `quanttune evaluate` against plain loops over the same rows."""

import json
import math

import datasets
import pytest
import torch
import transformers
from cases import LOADERS, bert_case, opt_case, vit_case
from torch.nn import functional as F
from typer.testing import CliRunner

import quanttune as qt
from quanttune import cli

runner = CliRunner()


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def run(*arguments):
    result = runner.invoke(cli.app, [*map(str, arguments)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture
def made(request, tmp_path):
    """Return the class of a case's model, its data's arguments, its rows and their batch."""
    data, rows, batch = request.param(tmp_path)
    arguments = ["--data", tmp_path / data, "--tokens", 5 if request.param is opt_case else 16]
    return getattr(transformers, LOADERS[request.param]), arguments, rows, batch


each_case = pytest.mark.parametrize("made", LOADERS, indirect=True)
with_bert = pytest.mark.parametrize("made", [bert_case], indirect=True)
with_vit = pytest.mark.parametrize("made", [vit_case], indirect=True)
with_opt = pytest.mark.parametrize("made", [opt_case], indirect=True)


@torch.no_grad()
def measured(model, batch):
    """The metric by hand: accuracy in per cent, or perplexity."""
    logits = model(**batch).logits.double()
    labels = batch["labels"]
    if logits.dim() == 2:
        right = [
            row.argmax().item() == label.item() for row, label in zip(logits, labels, strict=True)
        ]
        return 100 * sum(right) / len(right)
    losses = [
        F.cross_entropy(logits[i, j - 1][None], labels[i, j][None]).item()
        for i in range(len(labels))
        for j in range(1, labels.shape[1])
    ]
    return math.exp(sum(losses) / len(losses))


@each_case
def test_a_model_is_quantized_and_measured_as_by_hand(made, tmp_path):
    loader, data, rows, batch = made
    out = tmp_path / "deep" / "quantized"
    options = ["--bits", 6, "--weight-bits", 4, "--batch-size", rows, "--no-residual"]
    options += ["--override", "*0*=8", "--override", "*1.*output_quantizer=float"]
    result = run("calibrate", tmp_path / "model", *data, *options, "--out", out)
    assert f"ranges of {rows} rows" in result.output
    model = loader.from_pretrained(tmp_path / "model").eval()
    expected = [measured(model, batch)]
    overrides = {"*0*": {"bits": 8}, "*1.*output_quantizer": None}
    qt.quantize(model, 6, weight_bits=4, residual=False, overrides=overrides, data=[batch])
    expected.append(measured(model, batch))
    loaded = loader.from_pretrained(out).eval()
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    file = tmp_path / "numbers" / "a.json"
    split = ["--split", "train"]
    result = run("evaluate", out, *data, *split, "--batch-size", rows - 1, "--json", file)
    found = json.loads(file.read_text())
    assert found["rows"] == rows
    assert [found["float"], found["quantized"]] == pytest.approx(expected, rel=1e-5)
    assert found["quantization"]["overrides"] == overrides
    assert "W4A6, full_no_softmax" in result.output
    run("evaluate", tmp_path / "model", *data, *split, "--json", file)
    alone = json.loads(file.read_text())
    assert alone["float"] == pytest.approx(expected[0], rel=1e-5)
    assert alone["quantized"] is alone["quantization"] is None


@with_opt
def test_perplexity_of_a_model_that_knows_nothing(made, tmp_path):
    """Uniform logits: the perplexity is the number of words."""
    loader, data, _, _ = made
    model = loader.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        model.lm_head.weight.zero_()  # tied to the embedding
    model.save_pretrained(tmp_path / "model")
    run("evaluate", tmp_path / "model", *data, "--json", tmp_path / "a.json")
    words = model.config.vocab_size
    assert json.loads((tmp_path / "a.json").read_text())["float"] == pytest.approx(words, rel=1e-5)


@with_vit
def test_limits_draw_rows_by_the_seed(made, tmp_path):
    loader, data, rows, batch = made
    model = loader.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        right = (model(**batch).logits.argmax(-1) == batch["labels"]).float()
    drawn = datasets.Dataset.from_dict({"row": range(rows)}).shuffle(3).select(range(2))["row"]
    options = ["--split", "train", "--limit", 2, "--seed", 3, "--json", tmp_path / "a.json"]
    run("evaluate", tmp_path / "model", *data, *options)
    found = json.loads((tmp_path / "a.json").read_text())
    assert (found["rows"], found["float"]) == (2, 100 * right[list(drawn)].mean().item())
    options = ["--limit", 2, "--seed", 3, "--out", tmp_path / "out", "--bits", 5]
    run("calibrate", tmp_path / "model", *data, *options)
    expected = qt.quantize(model, 5, data=[batch["pixel_values"][list(drawn)]])
    sites = qt.summary(loader.from_pretrained(tmp_path / "out")).sites
    assert {s.name: s for s in sites} == {s.name: s for s in qt.summary(expected).sites}


@with_bert
def test_a_dry_run_writes_nothing_but_the_numbers(made, tmp_path):
    _, data, _, _ = made
    out, file = tmp_path / "out", tmp_path / "a.json"
    run("calibrate", tmp_path / "model", *data, "--out", out, "--dry-run", "--json", file)
    assert not out.exists()
    sites = json.loads(file.read_text())["summary"]["sites"]
    assert {site["bits"] for site in sites} == {8}
    assert all(site["absmax"] > 0 for site in sites)


@with_bert
def test_dynamic_ranges_need_no_rows(made, tmp_path):
    loader, data, _, batch = made
    options = ["--calibrator", "dynamic", "--out", tmp_path / "out"]
    assert "ranges of 0 rows" in run("calibrate", tmp_path / "model", *data, *options).output
    expected = loader.from_pretrained(tmp_path / "model").eval()
    qt.quantize(expected, calibrator="dynamic")
    loaded = loader.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(loaded(**batch).logits, expected(**batch).logits)


@with_bert
def test_what_does_not_fit_is_refused(made, tmp_path):
    _, data, _, _ = made
    out = tmp_path / "out"
    command = ["calibrate", tmp_path / "model", *data, "--out", out]
    for arguments, message in [
        (["--bits", 1], "bits must be from 2 to 16, got 1"),
        (["--override", "head"], "--override takes PATTERN=BITS or PATTERN=float, got 'head'"),
        (["--override", "head=int8"], "got 'head=int8'"),
        (["--override", "head=4"], "override 'head' matches no quantizer"),
        (["--calibrator", "best"], "calibrator must be one of minmax"),
    ]:
        with pytest.raises(ValueError, match=message):
            run(*command, *arguments)
        assert not out.exists()
    assert run(*command, "--limit", 0).exit_code == 2
    run(*command)
    with pytest.raises(ValueError, match=r"out is not empty: choose another --out"):
        run(*command)
    again = ["calibrate", out, *data, "--out", tmp_path / "again"]
    with pytest.raises(ValueError, match="is quantized already: give the float model"):
        run(*again)
    (tmp_path / "other.csv").write_text("text,label\nw1,0\nw2,7\n")
    with pytest.raises(ValueError, match=r"labels of the data \(0, 1, 2, 3, 4\) are not those"):
        run("evaluate", out, "--data", tmp_path / "other.csv")


@with_bert
def test_the_rest_of_a_killed_run_is_replaced(made, tmp_path):
    _, data, _, _ = made
    partial = tmp_path / ".out"
    partial.mkdir()
    (partial / "half.json").write_text("")
    run("calibrate", tmp_path / "model", *data, "--out", tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert not partial.exists()
    assert names >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert "half.json" not in names
