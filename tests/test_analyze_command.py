"""`quanttune analyze` and `quanttune report`: what they find, write and show."""

import base64
import json
import math
import re
from xml.etree import ElementTree

import datasets
import pytest
import torch
import transformers
from cases import LOADERS, bert_case, opt_case, run
from torch import nn
from torch.nn import functional as F

from quanttune.analysis.analysis import analyze
from quanttune.analysis.subject import Request, Subject
from quanttune.demo.analyze import recipe_subject
from quanttune.quantization.calibrators import CALIBRATORS
from quanttune.report.report import write_report


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def fewer_digits(short_digits, monkeypatch):
    monkeypatch.setattr(short_digits, "calibration", lambda job: [job.images["tuning"][:20]])


def drawings(page: str) -> list[str]:
    """The figures of a page, checked to be XML; matplotlib names each text in a comment."""
    urls = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', page)
    figures = [base64.b64decode(url).decode() for url in urls]
    for figure in figures:
        ElementTree.fromstring(figure)
    return figures


@torch.no_grad()
def quality(model, batch) -> float:
    """Accuracy in per cent, or the geometric mean of the next token's probability, by hand."""
    logits = model(**batch).logits.double()
    labels = batch["labels"]
    if logits.dim() == 2:
        return 100 * (logits.argmax(1) == labels).double().mean().item()
    likelihood = F.log_softmax(logits[:, :-1], -1).gather(-1, labels[:, 1:, None])
    return 100 * math.exp(likelihood.mean().item())


@pytest.mark.parametrize("case", LOADERS)
def test_a_model_and_its_data_are_analysed(case, tmp_path):
    data, rows, batch = case(tmp_path)
    model = getattr(transformers, LOADERS[case]).from_pretrained(tmp_path / "model").eval()
    out, copy = tmp_path / "deep" / "out", tmp_path / "sub" / "a.json"
    options = ["--tokens", 5 if case is opt_case else 16, "--bits", 6, "--compare"]
    model.save_pretrained(tmp_path / "other")
    options += [tmp_path / "other", "--data", tmp_path / data, "--out", out, "--json", copy]
    said = run("analyze", tmp_path / "model", *options).output
    assert "report.html" in said
    found = json.loads((out / "analysis.json").read_text())
    assert json.loads(copy.read_text()) == found
    taken = rows // 2
    assert found["facts"]["rows"] == [taken, rows - taken]
    expected = quality(model, {name: x[taken:] for name, x in batch.items()})
    one, other = found["models"]
    assert one["float"] == pytest.approx(expected, rel=1e-4)
    assert (one["name"], other["name"]) == ("model", "other")
    assert {**one, "name": ""} == {**other, "name": ""}
    assert found["calibrators"].keys() == CALIBRATORS.keys()
    assert found["calibrators"]["minmax"] == one["minmax"] == found["sweep"][-1]["value"]
    assert found["sweep"][-1]["saturation"] == 0
    best = next(point for point in found["sweep"] if point["percent"] == found["best"])
    assert best["value"] == max(point["value"] for point in found["sweep"])
    assert all(0 <= site["sensitivity"] < 10 for site in found["sites"])
    assert {site["block"] for site in found["sites"]} == {*one["blocks"], "outside"}
    if case is bert_case:
        texts = [site["outliers"]["largest"][0]["text"] for site in found["sites"][:3]]
        assert all(texts)
        run("report", out / "analysis.json", "--out", tmp_path / "again.html")
        assert (tmp_path / "again.html").read_text() == (out / "report.html").read_text()
    page = (out / "report.html").read_text()
    for number in range(2, 7):
        assert f"(Fig. {number})" in page
    figures = drawings(page)
    assert len(figures) == 5 + sum(len(model["channels"]) for model in found["models"])
    for text in ("error of the output (%)", "residual sums", "float model", "minmax", "max |x|"):
        assert any(text in figure for figure in figures)
    assert "http" not in re.sub(r'src="[^"]+"', "", page)  # it needs nothing else


def test_a_recipe_is_analysed_beside_an_arm(fewer_digits, tmp_path):
    run("analyze", "digits", "--compare", "paper", "--out", tmp_path)
    found = json.loads((tmp_path / "analysis.json").read_text())
    assert [model["name"] for model in found["models"]] == ["digits", "paper"]
    assert list(found["models"][0]["blocks"]) == [f"blocks.{i}" for i in range(2)]
    assert found["facts"]["paper"] == "QuantTune as published"
    subject, _ = recipe_subject("digits")
    assert found["models"][0]["float"] == subject.evaluate(subject.model)


def test_results_files_make_one_page(tmp_path):
    demo = {
        "task": "digits", "metric": "accuracy", "caveats": ["a caveat"], "seconds": 1.0,
        "recipe": {"steps": 1, "arms": []}, "environment": {"python": "3"},
        "rows": [
            {"seed": 0, "arm": "base", "bits": 8, "calibrator": "minmax", "weights": "channel",
             "metric": "accuracy", "value": 43.21},
        ],
        "ranges": {"0": {"base": {"blocks.0.norm1": 2.0}}},
    }  # fmt: skip
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for file, task in zip(files, ("digits", "letters"), strict=True):
        file.write_text(json.dumps({**demo, "task": task}))
    page = tmp_path / "deep" / "page.html"
    assert "2 file(s) make a page" in run("report", *files, "--out", page, "--dry-run").output
    assert not page.exists()
    run("report", *files, "--out", page)
    text = page.read_text()
    assert text.count("43.2") == text.count("a caveat") == len(drawings(text)) == 2
    assert "<title>quanttune: digits, letters</title>" in text


def test_dry_run_loads_and_writes_nothing(fewer_digits, tmp_path):
    said = run("analyze", "digits", "--dry-run", "--out", tmp_path / "out").output
    assert "digits: 20 rows" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "x.csv"], "--data needs a model: quanttune analyze MODEL --data DATA"),
        (["digits", "--compare", "best"], "compare digits with one of base, control, .*'best'"),
        (["digits", "--tokens", "5"], "--tokens has an effect with --data only"),
        (["digits", "--batch-size", "5"], "--batch-size has an effect with --data only"),
        (["digits", "--site", "blocks.1.mlp"], "no tensor is called 'blocks.1.mlp': did you mean"),
    ],
)
def test_bad_arguments_say_what_was_wanted(fewer_digits, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        run("analyze", *arguments, "--out", tmp_path)


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=24, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Embedding(32, 8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))


@pytest.mark.parametrize(("make", "blocks"), [(llama, 1), (perceptron, 0)])
def test_models_without_layer_norm_have_a_page(make, blocks, tmp_path):
    model = make().eval()
    data = [torch.randint(32, (3, 5)) for _ in range(2)]
    subject = Subject("small", model, data, "accuracy", lambda model: 50.0)
    found = analyze(subject, Request(thresholds=(99.0, 100.0), calibrators=("minmax",)))
    assert len(found["models"][0]["blocks"]) == blocks
    numbers, page = write_report(found, tmp_path, "analysis.json")
    assert ("has no repeated blocks with a norm" in page.read_text()) is (blocks == 0)
    numbers.unlink()
    page.unlink()
    page.mkdir()  # a page that cannot be written: numbers, which say that all is there, come last
    with pytest.raises(OSError, match=r"report\.html"):
        write_report(found, tmp_path, "analysis.json")
    assert not numbers.exists()


def test_an_analysis_is_not_overwritten(tmp_path):
    (tmp_path / "analysis.json").write_text("{}")
    with pytest.raises(ValueError, match="holds an analysis: choose another --out"):
        run("analyze", "digits", "--out", tmp_path)
    assert (tmp_path / "analysis.json").read_text() == "{}"
