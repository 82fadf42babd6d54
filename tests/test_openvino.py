"""Exported files in OpenVINO: what it computes, and in which integers."""

import sys
from collections import Counter

import onnx
import pytest
import torch
from models import shallow
from torch import nn

import quanttune as qt
from quanttune.deploy.onnx_graph import PRODUCTS

# else what is not rounded may be bfloat16, and what is, is rounded once more
ACCURATE = {"EXECUTION_MODE_HINT": "ACCURACY"}
MULTIPLY = {"FullyConnected", "MatMul", "Convolution", "Subgraph"}
PRECISIONS = {"uint8": "u8", "int8": "i8"}
CASES = [("vit", 8, "uint8"), ("bert", 6, "int8")]


@pytest.fixture
def openvino(monkeypatch):
    # it reports its import, and does not without this module
    monkeypatch.setitem(sys.modules, "openvino_telemetry", None)
    return pytest.importorskip("openvino")


@pytest.mark.parametrize(("name", "bits", "act_dtype"), CASES, ids=str)
@torch.no_grad()
def test_openvino_computes_the_simulation(name, bits, act_dtype, openvino, tmp_path):
    example = shallow(name)
    model = example.model
    exact = example.logits()
    qt.quantize(model, bits, coverage="linear", data=[example.inputs])
    qt.export_onnx(model, example.inputs, tmp_path / "model.onnx", act_dtype=act_dtype)

    compiled = openvino.Core().compile_model(tmp_path / "model.onnx", "CPU", ACCURATE)
    logits = torch.from_numpy(compiled([example.inputs[:3].numpy()])[0])
    simulated = example.logits(rows=slice(3))
    lost = (exact[:3] - simulated).abs().mean()
    assert (logits - simulated).abs().mean() < lost / 20
    linear = sum(isinstance(module, nn.Linear) for module in model.modules())
    assert operators(compiled)["FullyConnected", PRECISIONS[act_dtype]] == linear


@pytest.mark.parametrize("shapes", [{0: "batch"}, {}], ids=["dynamic", "static"])
@pytest.mark.parametrize("name", ["vit", "bert", "swin"])
@torch.no_grad()
def test_every_product_is_one_of_integers(name, shapes, openvino, tmp_path):
    """Attention's too, which OpenVINO fuses, where what is rounded is made floats at once."""
    example = shallow(name)
    for parameter in example.model.parameters():
        if parameter.dim() == 1:
            parameter.add_(torch.randn_like(parameter) / 10)
    qt.quantize(example.model, 8, coverage="full", data=[example.inputs])
    path = tmp_path / "model.onnx"
    qt.export_onnx(example.model, example.inputs, path, act_dtype="int8", dynamic=shapes)
    compiled = openvino.Core().compile_model(path, "CPU", ACCURATE)
    logits = torch.from_numpy(compiled([example.inputs.numpy()])[0])
    torch.testing.assert_close(logits, example.logits(), rtol=0, atol=1e-5)
    names = {node.name for node in onnx.load(path).graph.node if node.op_type in PRODUCTS}
    types = {}
    for operator in compiled.get_runtime_model().get_ops():
        fact = operator.get_rt_info()
        for part in fact["originalLayersNames"].astype(str).split(","):
            if fact["layerType"].astype(str) in MULTIPLY:
                types[part.split("/")[0]] = fact["primitiveType"].astype(str)[-2:]
    assert {name: types.get(name) for name in names} == dict.fromkeys(names, "i8")


@pytest.mark.parametrize("coverage", ["full", "linear"])
@torch.no_grad()
def test_small_products_without_biases(coverage, openvino, tmp_path):
    """OpenVINO 2026.4 else makes one operator of both, and answers nonsense in thousands."""
    model = nn.Sequential(nn.Linear(24, 16, bias=False), nn.Tanh(), nn.Linear(16, 5, bias=False))
    x = torch.randn(6, 24)
    qt.quantize(model.eval(), 8, coverage=coverage, data=[x])
    qt.export_onnx(model, x, tmp_path / "model.onnx", act_dtype="int8", dynamic={})
    compiled = openvino.Core().compile_model(tmp_path / "model.onnx", "CPU", ACCURATE)
    torch.testing.assert_close(torch.from_numpy(compiled([x.numpy()])[0]), model(x))


@torch.no_grad()
def test_an_epsilon_is_added_to_the_variance_of_values(openvino, tmp_path):
    """OpenVINO 2026.4 else adds it to that of int8 codes, which is larger by the scale's square."""
    model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16, eps=0.1), nn.Linear(16, 4)).eval()
    x = torch.randn(4, 5, 8)
    qt.quantize(model, 8, coverage="full", data=[x])
    qt.export_onnx(model, x, tmp_path / "model.onnx", act_dtype="int8")
    compiled = openvino.Core().compile_model(tmp_path / "model.onnx", "CPU", ACCURATE)
    torch.testing.assert_close(torch.from_numpy(compiled([x.numpy()])[0]), model(x))


def operators(compiled):
    """Count what was compiled, by the kind and the type that it computes in."""
    facts = [operator.get_rt_info() for operator in compiled.get_runtime_model().get_ops()]
    return Counter(
        (fact["layerType"].astype(str), fact["runtimePrecision"].astype(str)) for fact in facts
    )


@pytest.mark.parametrize("name", ["vit", "deit"])
@torch.no_grad()
def test_class_tokens_beside_rounded_patches(name, openvino, tmp_path):
    """OpenVINO 2026.4 else gives every channel of the patches the bias of channel 0."""
    example = shallow(name)
    for parameter in example.model.parameters():
        if parameter.dim() == 1:
            parameter.add_(torch.randn_like(parameter) / 10)
    qt.quantize(example.model, 8, coverage="full", data=[example.inputs])
    qt.export_onnx(example.model, example.inputs, tmp_path / "model.onnx")
    compiled = openvino.Core().compile_model(tmp_path / "model.onnx", "CPU", ACCURATE)
    logits = torch.from_numpy(compiled([example.inputs.numpy()])[0])
    torch.testing.assert_close(logits, example.logits(), rtol=0, atol=1e-5)
