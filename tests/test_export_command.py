"""`quanttune export`: the file computes what the folder's model simulates."""

import json

import numpy as np
import onnx_files
import pytest
import torch
import transformers
from cases import LOADERS, bert_case, run

import quanttune as qt


@pytest.mark.parametrize("case", LOADERS)
@torch.no_grad()
def test_the_file_computes_what_the_model_does(case, tmp_path):
    *_, batch = case(tmp_path)
    inputs = {name: x for name, x in batch.items() if name != "labels"}
    if "attention_mask" not in inputs and "input_ids" in inputs:  # the tokenizer gives all three
        ids = inputs["input_ids"]
        inputs |= {"attention_mask": torch.ones_like(ids), "token_type_ids": ids * 0}
    model = getattr(transformers, LOADERS[case]).from_pretrained(tmp_path / "model").eval()
    floats = {key: x for key, x in inputs.items() if case is bert_case or key != "token_type_ids"}
    exact = model(**floats).logits
    qt.quantize(model, 8, coverage="full", data=[floats])
    model.save_pretrained(tmp_path / "model")
    path = tmp_path / "model.onnx"
    said = run("export", tmp_path / "model", "--out", path, "--json", tmp_path / "a.json").output
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["bytes"] == path.stat().st_size
    assert all(name in said for name in found["inputs"])
    feeds = {name: inputs[name].numpy() for name in found["inputs"] if name in inputs}
    actual = onnx_files.run(path, feeds)["logits"]
    expected = model(**floats).logits
    # codes flip, and others behind them: nearer than the float model is
    error = np.abs(actual - expected.numpy()).mean()
    assert error < (exact - expected).abs().mean()


def test_a_float_model_is_refused(tmp_path):
    bert_case(tmp_path)
    with pytest.raises(ValueError, match="model is not quantized: make it so by quanttune calibra"):
        run("export", tmp_path / "model", "--out", tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()
