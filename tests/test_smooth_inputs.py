"""smooth_inputs: what it computes, leaves alone, saves and exports."""

import copy
import json

import numpy as np
import onnx
import onnx_files
import pytest
import torch
from equalized import EXAMPLES, each_model, prepared, relative
from oracle import assert_same_bits
from torch import nn

import quanttune as qt
from quanttune.quantization.methods import SmoothInputs, SmoothQuant
from quanttune.quantization.methods.equalizing.readers import find_other_readers, find_pairs
from quanttune.quantization.restoration import restorations
from quanttune.quantization.running import Data
from quanttune.quantization.saving.description import describe
from quanttune.quantization.scheme import Scheme


class Tail(nn.Module):
    """A LayerNorm, a Linear that reads it, and one behind a GELU, a channel of which is large."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 4)
        with torch.no_grad():
            self.up.weight[3] *= 50
            self.down.weight[:, 3] /= 50

    def forward(self, x):
        return self.down(nn.functional.gelu(self.up(self.norm(x))))


@pytest.fixture
def x():
    return torch.randn(64, 8, generator=torch.Generator().manual_seed(1))


@each_model
def test_the_float_model_computes_what_it_did(name):
    example = prepared(name)  # in float64
    model, exact, data = example.model, example.logits(), Data([example.inputs])
    readers = {n for pair in find_pairs(model, data) for n in pair.readers}
    before = copy.deepcopy(model.state_dict())
    SmoothInputs().apply(model, Scheme(8), data)
    assert relative(example.logits(), exact) < 1e-14
    smoothed = set(restorations(model))
    assert smoothed
    assert not smoothed & readers
    after = model.state_dict()
    changed = {k.rpartition(".")[0] for k in before if not torch.equal(after[k], before[k])}
    assert changed == smoothed
    SmoothInputs(0.3).apply(model, Scheme(8), data)  # once more, and beside others
    SmoothQuant().apply(model, Scheme(8), data)
    assert set(restorations(model)) >= smoothed
    assert relative(example.logits(), exact) < 1e-6  # the product of two factors is a float32


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8, 1.0])
def test_factors_by_hand(alpha, x):
    model = Tail().requires_grad_(False)
    hidden, weight = nn.functional.gelu(model.up(model.norm(x))), model.down.weight.clone()
    scale = hidden.abs().amax(0) ** alpha / weight.abs().amax(0) ** (1 - alpha)
    SmoothInputs(alpha).apply(model, Scheme(8), Data([x[:40], x[40:]]))
    seen = []
    model.down.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(x)
    torch.testing.assert_close(seen[0], hidden / scale)
    torch.testing.assert_close(model.down.weight, weight * scale)


def test_what_reads_no_layer_norm():
    example = EXAMPLES["bert"]()
    found = find_other_readers(example.model.eval(), Data([example.inputs]))
    layers = [
        f"bert.encoder.layer.{i}.{end}"
        for i in range(2)
        for end in ("attention.output.dense", "output.dense")
    ]
    assert list(found) == [*layers, "bert.pooler.dense", "classifier"]


def test_channels_that_differ_cost_less(x):
    model, errors = Tail().eval(), {}
    exact = model(x)
    for methods in ((), ("smooth_inputs",)):
        quantized = qt.quantize(copy.deepcopy(model), coverage="linear", methods=methods, data=[x])
        errors[methods] = relative(quantized(x), exact)
    assert errors["smooth_inputs",] < errors[()] / 3


@pytest.mark.parametrize("name", ["bert", "opt", "gpt2"])
def test_a_saved_model_computes_the_same_bits(name, tmp_path):
    example = EXAMPLES[name]()
    model = example.model.eval()
    qt.quantize(model, methods=["smooth_inputs", "erq"], data=[example.inputs])
    described = describe(model)["restorations"]
    assert described == {module: [module] for module in restorations(model)}
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(example.logits(loaded), example.logits())
    qt.save(model, tmp_path / "file.safetensors")
    again = qt.load(EXAMPLES[name]().model.eval(), tmp_path / "file.safetensors")
    assert torch.equal(example.logits(again), example.logits())
    assert_same_bits(again.state_dict(), model.state_dict())


def test_a_file_multiplies_before_it_rounds(x, tmp_path):
    model = Tail().eval()
    qt.quantize(model, 8, weight_bits=7, coverage="linear", methods=["smooth_inputs"], data=[x])
    path = tmp_path / "model.onnx"
    qt.export_onnx(model, x, path)
    assert qt.verify(path, model, data=[x]).passed
    graph = onnx.load(path).graph
    makers = {name: node for node in graph.node for name in node.output}
    (rounding,) = (n for n in graph.node if n.output[0] == "down.input_quantizer.codes")
    before = rounding
    while before.op_type in ("QuantizeLinear", "Clip"):
        before = makers[before.input[0]]
    assert before.op_type == "Mul"
    tensors = onnx_files.tensors(path)
    (factors,) = (tensors[name] for name in before.input if name in tensors)
    np.testing.assert_allclose(factors, 1 / model.down.restoration.scale.numpy(), rtol=1e-6)
    stored = json.loads(onnx.load(path).metadata_props[0].value)
    assert stored["restorations"] == {"down": ["down"]}


def test_an_error_leaves_nothing_behind(x):
    model = Tail().eval()
    before, exact = copy.deepcopy(model.state_dict()), model(x)
    with pytest.raises(ValueError, match="nowhere"):
        qt.quantize(model, methods=["smooth_inputs"], overrides={"nowhere": None}, data=[x])
    assert_same_bits(model.state_dict(), before)
    assert torch.equal(model(x), exact)


def test_what_cannot_be_smoothed_is_said(x):
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 4))
    with pytest.raises(ValueError, match=r"no Linear module .* something else than a norm"):
        qt.quantize(model, methods=["smooth_inputs"], data=[x])
    with pytest.raises(ValueError, match=r"alpha must be from 0 to 1, got 1\.2"):
        SmoothInputs(1.2)
    spoiled = Tail().eval()
    with torch.no_grad():
        spoiled.up.bias[0] = torch.nan
    with pytest.raises(ValueError, match="down got NaN, inf or nothing"):
        qt.quantize(spoiled, methods=["smooth_inputs"], data=[x])
