"""`quanttune verify`: the file's numbers against ONNX Runtime by hand, statuses, last lines."""

import json
import math

import datasets
import numpy as np
import onnx
import onnx_files
import pytest
import torch
import transformers
from cases import LOADERS, bert_case, opt_case, run
from torch.nn import functional as F

import quanttune as qt
from quanttune.jobs import verify


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def exported(request, tmp_path_factory):
    """Return a folder, its file, the data's arguments and the data as one batch."""
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("verify")
    data, rows, batch = request.param(place)
    folder, path = place / "model", place / "model.onnx"
    model = getattr(transformers, LOADERS[request.param]).from_pretrained(folder).eval()
    qt.quantize(model, 8, coverage="full", data=[batch])
    model.save_pretrained(folder)
    run("export", folder, "--out", path)
    arguments = ["--data", place / data, "--split", "train", "--batch-size", rows]
    arguments += ["--tokens", 5 if request.param is opt_case else 16]
    return folder, path, arguments, batch


each_case = pytest.mark.parametrize("exported", LOADERS, indirect=True)
with_bert = pytest.mark.parametrize("exported", [bert_case], indirect=True)


def by_hand(path, batch):
    """Return what ONNX Runtime gets in the task: accuracy in per cent, or perplexity."""
    names = [value.name for value in onnx.load(path).graph.input]
    mask = torch.ones_like(batch.get("input_ids", batch["labels"]))
    inputs = {"attention_mask": mask, "token_type_ids": 0 * mask, **batch}
    (logits,) = onnx_files.run(path, {name: inputs[name] for name in names}).values()
    logits, labels = torch.from_numpy(logits).double(), batch["labels"]
    if logits.dim() == 2:
        return {"accuracy": 100 * (logits.argmax(-1) == labels).double().mean().item()}
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    return {"perplexity": math.exp(loss.item())}


@each_case
def test_a_right_file_is_measured_and_passes(exported, tmp_path):
    folder, path, data, batch = exported
    result = run("verify", folder, "--onnx", path, *data, "--json", tmp_path / "a" / "b.json")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "a" / "b.json").read_text())
    assert found["passed"]
    assert found["rows"] == len(batch["labels"])
    assert found["measured"]["file"] == pytest.approx(by_hand(path, batch), rel=1e-6)
    run("evaluate", folder, *data, "--json", tmp_path / "c.json")
    evaluated = json.loads((tmp_path / "c.json").read_text())["quantized"]
    assert found["measured"]["simulation"] == evaluated
    assert found["measured"]["noise"].keys() == evaluated.keys()
    assert len(found["layers"]) == len(onnx_files.sites(onnx.load(path)))
    (name,) = evaluated
    assert f"{name} of {found['rows']} rows: simulation " in result.output
    result = run("verify", folder, "--onnx", path, "--json", tmp_path / "d.json")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "d.json").read_text())["measured"] is None


@with_bert
def test_what_is_wrong_is_in_the_last_line(exported, tmp_path):
    folder, path, data, _ = exported
    file, path = onnx.load(path), tmp_path / "wrong.onnx"
    (bias,) = (t for t in file.graph.initializer if t.name == "classifier.bias")
    wrong = np.float32([0, 0, 9, 0, 0])
    bias.CopyFrom(onnx.numpy_helper.from_array(wrong, bias.name))
    onnx.save(file, path)
    for arguments in (data, []):
        result = run("verify", folder, "--onnx", path, *arguments)
        assert result.exit_code == 1
        last = result.output.rstrip().rpartition("\n")[2]
        assert last.startswith(f"{path} fails: 1 of ")
        assert last.endswith("tensors are not those of the model: classifier.bias")
        assert "classifier.output_quantizer is the first layer that disagrees" in result.output


@with_bert
def test_what_cannot_be_compared_says_why(exported, tmp_path):
    folder, path, _, _ = exported
    part = tmp_path / "part.onnx"
    part.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"part.onnx is no whole ONNX file"):
        run("verify", folder, "--onnx", part)
    with pytest.raises(FileNotFoundError, match=r"there is no file .*none.onnx"):
        run("verify", folder, "--onnx", tmp_path / "none.onnx")
    with pytest.raises(ValueError, match="--metric has an effect with --data only"):
        run("verify", folder, "--onnx", path, "--metric", "f1")


@pytest.mark.parametrize(
    ("name", "simulation", "file", "noise", "tolerance", "allowed"),
    [
        ("accuracy", 80.0, 79.1, 80.0, 1.0, None),
        ("accuracy", 80.0, 78.5, 80.0, 1.0, 1.0),
        ("accuracy", 80.0, 78.5, 80.7, 1.0, 1.4),
        ("accuracy", 80.0, 78.5, 80.8, 1.0, None),
        ("accuracy", 80.0, 78.5, 80.0, 2.0, None),
        ("perplexity", 20.0, 20.15, 20.0, 1.0, None),
        ("perplexity", 20.0, 20.25, 20.0, 1.0, 0.2),
        ("perplexity", 20.0, math.nan, 20.0, 1.0, 0.2),
    ],
)
def test_a_metric_may_be_off_by_the_tolerance_or_twice_the_noise(
    name, simulation, file, noise, tolerance, allowed
):
    numbers = {"simulation": {name: simulation}, "file": {name: file}, "noise": {name: noise}}
    problems = list(verify.too_far(numbers, tolerance))
    assert len(problems) == (allowed is not None)
    if problems:
        assert f"{name}: {file:.6g} of the file, {simulation:.6g} of the simul" in problems[0]
        assert f"more than {allowed:.3g} apart" in problems[0]
