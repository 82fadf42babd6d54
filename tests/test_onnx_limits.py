"""Codes of fewer than 8 bits: limits that were there before are not there again."""

from collections import Counter

import numpy as np
import onnx
import onnx_files
import pytest
from models import shallow

import quanttune as qt
from quanttune.deploy import onnx_graph


def operators(path):
    return Counter(node.op_type for node in onnx.load(path).graph.node)


@pytest.mark.parametrize("act_dtype", ["int8", "uint8"])
@pytest.mark.parametrize("name", ["bert", "vit"])
def test_limits_of_one_grid_are_there_once(name, act_dtype, tmp_path, monkeypatch):
    """Between two roundings to one grid stands no Clip, which computes nothing there."""
    example = shallow(name)
    qt.quantize(example.model, 6, coverage="full", data=[example.inputs])
    fewer, all_of_them = tmp_path / "fewer.onnx", tmp_path / "all.onnx"
    qt.export_onnx(example.model, example.inputs, fewer, act_dtype=act_dtype)
    monkeypatch.setattr(onnx_graph, "drop_limits", lambda graph: None)
    qt.export_onnx(example.model, example.inputs, all_of_them, act_dtype=act_dtype)
    assert operators(fewer)["Clip"] < operators(all_of_them)["Clip"]
    (given,) = onnx.load(fewer).graph.input
    feeds = {given.name: example.inputs}
    for as_written in (True, False):
        answers = [
            onnx_files.run(path, feeds, as_written=as_written) for path in (fewer, all_of_them)
        ]
        for found, expected in zip(*(answer.values() for answer in answers), strict=True):
            np.testing.assert_array_equal(found, expected)


def test_limits_of_a_narrower_grid_stay(tmp_path):
    """4 bits behind 6: the second Clip does something."""
    example = shallow("bert")
    narrow = {"bert.encoder.layer.0.intermediate.dense.input_quantizer": {"bits": 4}}
    qt.quantize(example.model, 6, coverage="full", data=[example.inputs], overrides=narrow)
    qt.export_onnx(example.model, example.inputs, tmp_path / "m.onnx")
    graph = onnx.load(tmp_path / "m.onnx").graph
    makers = {name: node for node in graph.node for name in node.output}
    (rounding,) = (n for n in graph.node if "intermediate.dense.input_q" in n.output[0])
    assert makers[rounding.input[0]].op_type == "Clip"
    assert qt.verify(tmp_path / "m.onnx", example.model, data=[example.inputs]).passed
