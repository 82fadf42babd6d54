"""Files for ONNX Runtime: rounding in front of a multiplication by a power of two."""

import numpy as np
import onnx
import onnx_files
import pytest
import torch
from onnx import numpy_helper
from torch import nn
from torch.nn import functional as F

import quanttune as qt
from quanttune.deploy import onnx_graph


class Attention(nn.Module):
    """Attention of heads of 16 channels, whose queries are multiplied by 1/4 or another factor."""

    def __init__(self, factor=None):
        super().__init__()
        self.qkv, self.factor = nn.Linear(32, 96), factor

    def forward(self, x):
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 16).permute(2, 0, 3, 1, 4).unbind(0)
        return F.scaled_dot_product_attention(q, k, v, scale=self.factor).flatten(1)


def exported(path, model, x, coverage="linear", **options):
    torch.manual_seed(0)
    qt.quantize(model.eval(), 8, coverage=coverage, data=[x])
    qt.export_onnx(model, {"x": x}, path, **options)
    return onnx.load(path)


def divided(file):
    return [node for node in file.graph.node if node.op_type == "Div"]


@pytest.mark.parametrize("act_dtype", ["int8", "uint8"])
def test_codes_are_the_same_without_the_multiplication(act_dtype, tmp_path, monkeypatch):
    x, model = 3 * torch.randn(2, 5, 32), Attention()
    file = exported(tmp_path / "new.onnx", model, x, act_dtype=act_dtype)
    (divide,) = divided(file)
    assert not any(node.op_type == "Mul" for node in file.graph.node)
    assert onnx_files.tensors(tmp_path / "new.onnx")[divide.input[1]] == 0.25
    assert qt.verify(tmp_path / "new.onnx", model, data=[x]).passed

    monkeypatch.setattr(onnx_graph, "round_before_factors", lambda _: None)
    qt.export_onnx(model, {"x": x}, tmp_path / "old.onnx", act_dtype=act_dtype)
    for as_written in (True, False):
        new, old = (
            onnx_files.run(tmp_path / f"{name}.onnx", {"x": x}, as_written=as_written)
            for name in ("new", "old")
        )
        for found, expected in zip(new.values(), old.values(), strict=True):
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("factor", [0.3, 2.0**-30, 0.0, -0.25])
def test_other_factors_stay(factor, tmp_path):
    """Dividing by 0.3 rounds elsewhere; by others a scale would be 0, infinite or negative."""
    x = torch.randn(2, 5, 32)
    assert not divided(exported(tmp_path / "m.onnx", Attention(factor), x))


@pytest.mark.parametrize("target", ["openvino", "tensorrt"])
def test_other_runtimes_multiply(target, tmp_path):
    x = torch.randn(2, 5, 32)
    assert not divided(exported(tmp_path / "m.onnx", Attention(), x, target=target))


@pytest.mark.parametrize(("act_dtype", "count"), [("uint8", 0), ("int8", 1)])
def test_what_was_rounded_before_is_rounded_twice(act_dtype, count, tmp_path):
    """ONNX Runtime would make one of two in a row; in files of int8 a Max lies between."""
    x, model = 3 * torch.randn(2, 5, 32), Attention()
    file = exported(tmp_path / "m.onnx", model, x, "full", act_dtype=act_dtype)
    assert len(divided(file)) == count
    assert qt.verify(tmp_path / "m.onnx", model, data=[x]).passed


def test_a_wrong_factor_is_found(tmp_path):
    x, model = 3 * torch.randn(2, 5, 32), Attention()
    file = exported(tmp_path / "m.onnx", model, x)
    file.graph.initializer.append(numpy_helper.from_array(np.float32(0.5), "other"))
    divided(file)[0].input[1] = "other"
    onnx.save(file, tmp_path / "other.onnx")
    found = qt.verify(tmp_path / "other.onnx", model, data=[x])
    assert not found.passed
    assert any("query" in problem for problem in found.problems)
