"""`quanttune export`: the file computes what the folder's model simulates."""

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


@torch.no_grad()
def test_the_file_computes_what_the_model_does(tmp_path):
    """Of models for images and for the next token, test_verify_command.py says so."""
    *_, batch = bert_case(tmp_path)
    inputs = {name: x for name, x in batch.items() if name != "labels"}
    loader = getattr(transformers, LOADERS[bert_case])
    model = loader.from_pretrained(tmp_path / "model").eval()
    exact = model(**inputs).logits
    qt.quantize(model, 8, coverage="full", data=[inputs])
    model.save_pretrained(tmp_path / "model")
    path = tmp_path / "model.onnx"
    said = run("export", tmp_path / "model", "--out", path, "--json", tmp_path / "a.json").output
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["bytes"] == path.stat().st_size
    assert all(name in said for name in found["inputs"])
    feeds = {name: inputs[name].numpy() for name in found["inputs"]}
    actual = onnx_files.run(path, feeds)["logits"]
    expected = model(**inputs).logits
    # codes flip, and others behind them: nearer than the float model is
    error = np.abs(actual - expected.numpy()).mean()
    assert error < (exact - expected).abs().mean()


def test_a_float_model_is_refused(tmp_path):
    bert_case(tmp_path)
    with pytest.raises(ValueError, match="model is not quantized: make it so by quanttune calibra"):
        run("export", tmp_path / "model", "--out", tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


@torch.no_grad()
def test_a_folder_of_compressed_tensors_is_whole(tmp_path):
    *_, batch = bert_case(tmp_path)
    inputs = {name: x for name, x in batch.items() if name != "labels"}
    loader = getattr(transformers, LOADERS[bert_case])
    model = loader.from_pretrained(tmp_path / "model").eval()
    qt.quantize(model, 8, coverage="linear_inputs", data=[inputs])
    model.save_pretrained(tmp_path / "model")
    options = ["--format", "compressed-tensors"]
    run("export", tmp_path / "model", "--out", tmp_path / "served", *options)
    served = loader.from_pretrained(tmp_path / "served").eval()
    torch.testing.assert_close(served(**inputs).logits, model(**inputs).logits)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "served")
    assert tokenizer("one two")["input_ids"]
    with pytest.raises(ValueError, match="--opset has an effect with --format onnx only"):
        run("export", tmp_path / "model", "--out", tmp_path / "b", *options, "--opset", 20)
    with pytest.raises(ValueError, match="--with-past has an effect with --format onnx only"):
        run("export", tmp_path / "model", "--out", tmp_path / "b", *options, "--with-past")
    with pytest.raises(ValueError, match=r"--format must be one of .*, torchao, got"):
        run("export", tmp_path / "model", "--out", tmp_path / "b", "--format", "gguf")


def perplexity(path, batch):
    """Return that of whole rows, which have no past yet."""
    ids = batch["input_ids"].numpy()
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    feeds["position_ids"] = np.arange(ids.shape[1])[None].repeat(len(ids), 0)
    _, heads, _, channels = onnx.load(path).graph.input[3].type.tensor_type.shape.dim
    empty = np.zeros((len(ids), heads.dim_value, 0, channels.dim_value), np.float32)
    for value in onnx.load(path).graph.input[3:]:
        feeds[value.name] = empty
    logits = torch.from_numpy(onnx_files.run(path, feeds)["logits"]).double()
    return math.exp(F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()))


@torch.no_grad()
def test_a_folder_is_exported_and_verified_to_generate(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    torch.manual_seed(0)
    data, rows, batch = opt_case(tmp_path)
    folder, path = tmp_path / "model", tmp_path / "model" / "model.onnx"
    model = getattr(transformers, LOADERS[opt_case]).from_pretrained(folder).eval()
    qt.quantize(model, 8, coverage="full", data=[batch])
    model.save_pretrained(folder)
    said = run("export", folder, "--out", path, "--with-past", "--json", tmp_path / "a.json").output
    assert "from input_ids, attention_mask, position_ids" in said
    arguments = ["--data", tmp_path / data, "--split", "train", "--batch-size", rows, "--tokens", 5]
    result = run("verify", folder, "--onnx", path, *arguments, "--json", tmp_path / "b.json")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "b.json").read_text())
    assert [output["name"] for output in found["outputs"]] == ["logits", "keys and values"]
    assert found["measured"]["file"]["perplexity"] == pytest.approx(perplexity(path, batch), 1e-6)
    result = run("verify", folder, "--onnx", path)  # of texts that are padded behind
    assert result.exit_code == 0, result.output
    with pytest.raises(ValueError, match=r"times one call without keys .* without --with-past"):
        run("bench", folder, "--onnx", path)
    result = run("doctor", "--onnx", path)
    assert "products in integers" in result.output
