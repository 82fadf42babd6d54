"""Files for ONNX Runtime on CPUs: products that add their bias themselves."""

from collections import Counter

import numpy as np
import onnx
import onnx_files
import pytest
from models import shallow
from torch import nn

import quanttune as qt
from quanttune.deploy.onnx_biases import DOMAIN, FUSED
from quanttune.deploy.products import explain

CASES = [
    ("vit", "int8", "linear"),
    ("bert", "uint8", "linear"),
    ("opt", "uint8", "full"),
    ("swin", "int8", "full"),
]


def exported(name, path, coverage="linear", bits=8, **options):
    example = shallow(name)
    qt.quantize(example.model, bits, coverage=coverage, data=[example.inputs])
    qt.export_onnx(example.model, example.inputs, path, **options)
    return example


def floats(path):
    return {product.name for product in explain(path).products if not product.is_integer}


def linear_with_bias(model):
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m.bias is not None]


@pytest.mark.parametrize(("name", "act_dtype", "coverage"), CASES)
def test_biases_are_added_by_the_product(name, act_dtype, coverage, tmp_path):
    path = tmp_path / "m.onnx"
    options = {"target": "onnxruntime-cpu", "act_dtype": act_dtype}
    example = exported(name, path, coverage, **options)
    file = onnx.load(path)
    onnx.checker.check_model(file, full_check=True)
    fused = [node for node in file.graph.node if node.op_type == FUSED]
    assert {node.domain for node in fused} == {DOMAIN}
    modules = {node.name.rpartition(".")[0] for node in fused}
    # of two dimensions, such as a head's, the biases of which are added otherwise
    assert modules <= set(linear_with_bias(example.model))
    assert len(modules) >= len(linear_with_bias(example.model)) - 2
    assert qt.verify(path, example.model, data=[example.inputs]).passed
    qt.export_onnx(example.model, example.inputs, tmp_path / "plain.onnx", act_dtype=act_dtype)
    assert floats(path) == floats(tmp_path / "plain.onnx")


@pytest.mark.parametrize("act_dtype", ["int8", "uint8"])
def test_answers_are_those_of_the_plain_file(act_dtype, tmp_path):
    plain, fused = tmp_path / "plain.onnx", tmp_path / "fused.onnx"
    example = exported("vit", plain, act_dtype=act_dtype)
    qt.export_onnx(
        example.model, example.inputs, fused, target="onnxruntime-cpu", act_dtype=act_dtype
    )
    (given,) = onnx.load(fused).graph.input
    feeds = {given.name: example.inputs[:1]}  # a size that the example did not have
    for as_written in (True, False):
        (found,), (expected,) = (
            onnx_files.run(path, feeds, as_written=as_written).values() for path in (fused, plain)
        )
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_they_read_uint8_where_the_file_has_int8(tmp_path):
    """ONNX Runtime multiplies int8 activations by loops that are slow on x86."""
    path = tmp_path / "m.onnx"
    exported("vit", path, target="onnxruntime-cpu", act_dtype="int8")
    file, tensors = onnx.load(path), onnx_files.tensors(path)
    for node in file.graph.node:
        if node.op_type == FUSED:
            assert tensors[node.input[4]] == np.uint8(128)
            assert tensors[node.input[1]].dtype == np.int8


def test_zero_points_of_their_own(tmp_path):
    """Activations from their lowest to their highest value, as `auto` makes them for onnx-cpu."""
    example, path = shallow("bert"), tmp_path / "m.onnx"
    qt.quantize(example.model, 8, symmetric=False, coverage="linear", data=[example.inputs])
    qt.export_onnx(example.model, example.inputs, path, target="onnxruntime-cpu")
    tensors = onnx_files.tensors(path)
    fused = [node for node in onnx.load(path).graph.node if node.op_type == FUSED]
    assert any(tensors[node.input[4]] != 128 for node in fused)
    assert qt.verify(path, example.model, data=[example.inputs]).passed


def test_products_without_a_bias_stay(tmp_path):

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.bare = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)

        def forward(self, x):
            return self.bare(self.inner(x))

    model = Twice().eval()
    example = shallow("vit").inputs.flatten()[:160].view(4, 5, 8)
    qt.quantize(model, 8, coverage="linear", data=[example])
    qt.export_onnx(model, {"x": example}, tmp_path / "m.onnx", target="onnxruntime-cpu")
    kinds = Counter(node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node)
    assert kinds[FUSED] == kinds["MatMul"] == 1
    assert qt.verify(tmp_path / "m.onnx", model, data=[example]).passed
