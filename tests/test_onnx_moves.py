"""Codes pass what only moves values, and what is computed does not change by a bit."""

import onnx
import onnx_files
import torch
from torch import nn

import quanttune as qt
from quanttune.deploy import onnx_graph
from quanttune.deploy.onnx_model import OnnxModel
from quanttune.deploy.onnx_moves import MOVES


class Heads(nn.Module):
    """Attention whose q, k and v are cut out of one product."""

    def __init__(self):
        super().__init__()
        self.qkv, self.mix = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        qkv = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(*qkv.unbind(0))
        return self.mix(y.transpose(1, 2).flatten(2)).transpose(1, 2)


class Halves(nn.Module):
    """Gives one half of a product, and goes on with the other."""

    def __init__(self):
        super().__init__()
        self.both, self.mix = nn.Linear(8, 16), nn.Linear(8, 8)

    def forward(self, x):
        one, other = self.both(x).chunk(2, -1)
        return one, self.mix(other)


def test_an_output_of_the_model_is_no_code(tmp_path):
    x = torch.randn(3, 5, 8)
    model = qt.quantize(Halves().eval(), coverage="full", data=[x])
    qt.export_onnx(model, x, tmp_path / "m.onnx")
    file = onnx.load(tmp_path / "m.onnx")
    assert [value.type.tensor_type.elem_type for value in file.graph.output] == [1, 1]  # floats
    for found, expected in zip(OnnxModel(tmp_path / "m.onnx")(x).values(), model(x), strict=True):
        torch.testing.assert_close(found, expected.detach(), rtol=0, atol=1e-5)


def test_codes_are_moved_not_floats(tmp_path, monkeypatch):
    x = torch.randn(3, 5, 8)
    model = qt.quantize(Heads().eval(), coverage="full", data=[x])
    qt.export_onnx(model, x, tmp_path / "moved.onnx")
    monkeypatch.setattr(onnx_graph, "move_codes", lambda _: None)
    qt.export_onnx(model, x, tmp_path / "as_traced.onnx")
    moved, traced = (OnnxModel(tmp_path / f"{name}.onnx")(x) for name in ("moved", "as_traced"))
    assert torch.equal(moved["output"], traced["output"])
    graph = onnx.load(tmp_path / "moved.onnx")
    onnx.checker.check_model(graph, full_check=True)
    made = {node.output[0]: node.op_type for node in graph.graph.node}
    movers = [node for node in graph.graph.node if node.op_type in MOVES]
    of_floats = [n for n in movers if made.get(n.input[0]) == "DequantizeLinear"]
    # the last one makes the output of the model
    assert [n.output[0] for n in of_floats] == [graph.graph.output[0].name]
    before, after = (onnx_files.operators(tmp_path / f"{n}.onnx") for n in ("as_traced", "moved"))
    assert all(before[kind] == after[kind] for kind in (*MOVES, "QuantizeLinear", "MatMul"))
