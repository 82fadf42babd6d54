"""Files of int8: a rounding for each reader, by which ONNX Runtime computes in integers."""

from collections import Counter

import numpy as np
import onnx
import onnx_files
import pytest
import torch
from models import shallow
from onnx import numpy_helper

import quanttune as qt
from quanttune.deploy import onnx_graph
from quanttune.deploy.onnx_readers import original
from quanttune.deploy.products import explain


def exported(name, path, bits=8):
    example = shallow(name)
    qt.quantize(example.model, bits, coverage="full", data=[example.inputs])
    qt.export_onnx(example.model, example.inputs, path, act_dtype="int8")
    return example


@pytest.mark.parametrize(("name", "bits"), [("bert", 8), ("opt", 8), ("swin", 8), ("swin", 6)])
def test_every_product_is_one_of_integers(name, bits, tmp_path):
    """All that read one tensor too: ONNX Runtime makes uint8 of int8 codes of one reader only."""
    exported(name, tmp_path / "m.onnx", bits)
    convolved = {"patch_embed.proj.conv"} if bits < 8 and name == "swin" else set()
    products = explain(tmp_path / "m.onnx").products
    assert {product.name for product in products if not product.is_integer} == convolved


def test_each_reader_has_a_rounding_of_its_own(tmp_path, monkeypatch):
    path = tmp_path / "m.onnx"
    example = exported("bert", path)
    graph = onnx.load(path).graph
    onnx.checker.check_model(onnx.load(path), full_check=True)
    uses = Counter(name for node in graph.node for name in node.input)
    made = {node.output[0]: node for node in graph.node}
    rounded = [node for node in graph.node if node.op_type == "DequantizeLinear"]
    rounded = [node for node in rounded if node.input[0] in made]
    assert rounded
    assert all(uses[n.input[0]] == uses[n.output[0]] == 1 for n in rounded if uses[n.output[0]])
    copies = [name for name in made if original(name) != name]
    query = "bert.encoder.layer.0.attention.self.query.input_quantizer.codes"
    assert {f"{query}#1", f"{query}#2"} <= set(copies)
    for name in copies:
        assert np.array_equal(made[name].input[1:], made[original(name)].input[1:])

    monkeypatch.setattr(onnx_graph, "copy_roundings", lambda _: None)
    qt.export_onnx(example.model, example.inputs, tmp_path / "once.onnx", act_dtype="int8")
    feeds = {"input_ids": example.inputs}
    (copied,), (once,) = (
        onnx_files.run(file, feeds, as_written=True).values()
        for file in (path, tmp_path / "once.onnx")
    )
    np.testing.assert_array_equal(copied, once)


def test_a_copy_with_another_scale_is_found(tmp_path):
    path = tmp_path / "m.onnx"
    example = exported("bert", path)
    assert qt.verify(path, example.model, data=[example.inputs]).passed
    file = onnx.load(path)
    (copy,) = (n for n in file.graph.node if n.output[0].endswith("query.input_quantizer.codes#1"))
    scale = onnx_files.tensors(path)[copy.input[1]]
    file.graph.initializer.append(numpy_helper.from_array(np.float32(2 * scale), "other"))
    copy.input[1] = "other"
    onnx.save(file, path)
    found = qt.verify(path, example.model, data=[example.inputs])
    assert any("query.input_quantizer" in problem for problem in found.problems)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("a.codes", "a.codes"), ("a.codes_1#2", "a.codes_1"), ("a#1.codes", "a#1.codes")],
)
def test_names_of_copies(name, expected):
    assert original(name) == expected


@torch.no_grad()
@pytest.mark.parametrize("name", ["bert", "swin"])
def test_the_file_computes_the_simulation(name, tmp_path):
    example = exported(name, tmp_path / "m.onnx")
    found = qt.verify(tmp_path / "m.onnx", example.model, data=[example.inputs])
    assert found.passed, found.problems
