"""`quanttune export`: the file computes what the folder's model simulates."""

import json

import numpy as np
import onnx_files
import pytest
import torch
import transformers
from cases import LOADERS, bert_case, run

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
    with pytest.raises(ValueError, match="--format must be one of onnx, compressed-tensors, got"):
        run("export", tmp_path / "model", "--out", tmp_path / "b", "--format", "gguf")
