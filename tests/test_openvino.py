"""Exported files in OpenVINO: what it computes, and in which integers."""

import sys
from collections import Counter

import pytest
import torch
from models import shallow
from torch import nn

import quanttune as qt

# else what is not rounded may be bfloat16, and what is, is rounded once more
ACCURATE = {"EXECUTION_MODE_HINT": "ACCURACY"}
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
