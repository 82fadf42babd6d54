"""A Max that changes nothing, where runtimes would compute otherwise than a file says."""

import numpy as np
import onnx_ir as ir

from .onnx_moves import MOVES
from .onnx_values import is_made, stored

FUSED = 256  # the largest width of products that OpenVINO makes one of


def keep_floats(graph: ir.Graph) -> None:
    """Put a Max behind what ONNX Runtime is to compute in float, and behind two products.

    It else makes integer operators of a softmax between codes, which is slower and not what is
    simulated, and of a convolution whose weight it then rounds to 8 bits itself. An output of the
    graph it returns rounded, where a transposed copy of it is rounded. Of two roundings in a row,
    to grids that differ, it makes one. A product that is rounded twice it computes in float.
    """
    for node in graph:
        of_floats = node.op_type == "Conv" and not _is_dequantized(node.inputs[1])
        if (of_floats or node.op_type == "Softmax") and _is_dequantized(node.inputs[0]):
            _keep(graph, node.outputs[0], "QuantizeLinear")
        if node.op_type == "MatMul" and len(node.outputs[0].uses()) > 1:
            _keep(graph, node.outputs[0], "QuantizeLinear")
        if node.op_type == "DequantizeLinear" and is_made(node.inputs[0], "QuantizeLinear"):
            _keep(graph, node.outputs[0], "QuantizeLinear", tuple(node.inputs[1:]))
        for output in node.outputs:
            if output.is_graph_output() and output.dtype == ir.DataType.FLOAT:
                _keep(graph, output, "Transpose")


def keep_from_others(graph: ir.Graph) -> None:
    """Put a Max where runtimes that take int8 would compute something else.

    OpenVINO 2026.4 adds a LayerNorm's epsilon to the variance of the codes, not of what they mean,
    and of two small products whose sizes it knows, without a bias, it makes one that answers
    nonsense. tract 0.23 takes a softmax of masked codes for one of values.
    """
    for node in graph:
        if node.op_type == "Softmax" and _is_masked(node.inputs[0]):
            _keep(graph, node.outputs[0], "QuantizeLinear")
        if node.op_type == "DequantizeLinear":
            _keep(graph, node.outputs[0], "LayerNormalization")
        if node.op_type == "MatMul" and _may_be_fused(node):
            for reader_type in {reader.op_type for reader, _ in node.outputs[0].uses()} - {"Add"}:
                _keep(graph, node.outputs[0], reader_type)


def keep_whole(graph: ir.Graph) -> None:
    """Put a Max behind what was rounded to int8 and is cut into parts, such as queries and keys.

    ONNX Runtime 1.32 else makes floats of all of it, once for each part.
    """
    for node in graph:
        if node.op_type == "DequantizeLinear" and is_made(node.inputs[0], "QuantizeLinear"):
            value = node.outputs[0]
            for reader_type in {reader.op_type for reader, _ in value.uses() if _is_cut(value)}:
                _keep(graph, value, reader_type)


def _keep(
    graph: ir.Graph,
    value: ir.Value,
    reader_type: str,
    grid: tuple[ir.Value | None, ...] | None = None,
) -> None:
    """Let the readers of one type take a value through a Max, but for those that have the grid."""
    of_type = [use for use in value.uses() if use[0].op_type == reader_type]
    readers = [use for use in of_type if tuple(use[0].inputs[1:]) != grid]
    producer = value.producer()
    if not readers or producer is None:
        return
    greatest = ir.node("Max", [value, stored(graph, np.float32(-np.inf), "lowest")])
    greatest.outputs[0].shape, greatest.outputs[0].type = value.shape, value.type
    for reader, index in readers:
        reader.replace_input_with(index, greatest.outputs[0])
    graph.insert_after(producer, greatest)


def _is_cut(value: ir.Value) -> bool:
    """Tell whether operators that only move a value make several of it."""
    moving = [reader for reader, _ in value.uses()]
    if not moving or not all(reader.op_type in MOVES for reader in moving):
        return False
    moved = [output for reader in moving for output in reader.outputs]
    return len(moved) > 1 or _is_cut(moved[0])


def _may_be_fused(product: ir.Node) -> bool:
    weight = product.inputs[1].producer() if product.inputs[1] else None
    codes = weight.inputs[0] if weight and weight.op_type == "DequantizeLinear" else None
    shape = product.outputs[0].shape
    if codes is None or not codes.is_initializer() or shape is None or not shape.is_static():
        return False
    width = shape[-1]
    return isinstance(width, int) and width <= FUSED


def _is_masked(scores: ir.Value | None) -> bool:
    """Tell whether a mask is added to rounded scores."""
    add = scores.producer() if scores else None
    return is_made(scores, "Add") and any(map(_is_dequantized, add.inputs))  # type: ignore[union-attr]


def _is_dequantized(value: ir.Value | None) -> bool:
    return is_made(value, "DequantizeLinear")
