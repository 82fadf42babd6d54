"""Sums that are written so that runtimes compute what the file says."""

import numpy as np
import onnx_ir as ir

from .onnx_moves import unmoved
from .onnx_values import is_made, stored


def keep_sums(graph: ir.Graph) -> None:
    """Write biases and class tokens in a form that no runtime's optimizer changes.

    Names stay: a file's tensors are compared by them.
    """
    for node in list(graph):
        if node.op_type == "Add":
            _keep_bias_of_product(graph, node)
        elif node.op_type == "Conv":
            _keep_bias_of_convolution(graph, node)
        elif node.op_type == "Concat":
            _keep_tokens(graph, node)


def _keep_bias_of_product(graph: ir.Graph, add: ir.Node) -> None:
    """Give a bias two dimensions more.

    ONNX Runtime 1.32 else makes a Gemm of product and bias where it knows their sizes: of floats,
    or, where its output is rounded, one that rounds the bias too.
    """
    bias = add.inputs[1]
    if not is_made(add.inputs[0], "MatMul") or (_rank(add.outputs[0]) or 0) < 3:
        return  # of two dimensions the sum would get a third
    if bias and bias.is_initializer() and _rank(bias) == 1:
        row = ir.node("Unsqueeze", [bias, stored(graph, np.array([0, 1]))])
        graph.insert_before(add, row)
        add.replace_input_with(1, row.outputs[0])


def _keep_bias_of_convolution(graph: ir.Graph, conv: ir.Node) -> None:
    """Add the bias of a convolution of rounded tensors that is computed in float.

    ONNX Runtime 1.32 else rounds it, to steps that are coarse below 8 bits. Where the output is
    rounded at once it stays: such a convolution multiplies integers.
    """
    bias = conv.inputs[2] if len(conv.inputs) > 2 else None
    readers = {use[0].op_type for use in conv.outputs[0].uses()}
    if not is_made(conv.inputs[0], "DequantizeLinear") or not bias or readers == {"QuantizeLinear"}:
        return
    places = (_rank(conv.inputs[1]) or 4) - 2
    column = ir.node("Unsqueeze", [bias, stored(graph, np.arange(1, places + 1))])
    plain = ir.node("Conv", conv.inputs[:2], conv.attributes, name=conv.name)
    added = ir.node("Add", [plain.outputs[0], column.outputs[0]])
    new = [plain, column, added]
    ir.convenience.replace_nodes_and_values(graph, conv, [conv], new, conv.outputs, added.outputs)


def _keep_tokens(graph: ir.Graph, concat: ir.Node) -> None:
    """Make class tokens of a batch by adding them to zeros, those of a patch.

    OpenVINO 2026.4 else gives all channels of the rounded patches beside an expanded token the bias
    of channel 0.
    """
    patches = next((x for x in concat.inputs if _is_rounded(x)), None)
    if patches is None or _rank(patches) != 3 or concat.attributes["axis"].as_int() not in (1, -2):
        return
    for index, x in enumerate(concat.inputs):
        token = x.producer().inputs[0] if is_made(x, "Expand") else None  # type: ignore[union-attr]
        if token is None or not token.is_initializer() or not _is_token(token, x):
            continue
        ends = [stored(graph, np.array([at])) for at in (0, 1)]
        first = ir.node("Slice", [patches, *ends, ends[1]])
        zeros = ir.node("Mul", [first.outputs[0], stored(graph, np.array([0], np.float32))])
        rows = ir.node("Add", [zeros.outputs[0], token])
        rows.outputs[0].shape, rows.outputs[0].type = x.shape, x.type  # type: ignore[union-attr]
        graph.insert_before(concat, [first, zeros, rows])
        concat.replace_input_with(index, rows.outputs[0])


def _is_rounded(value: ir.Value | None) -> bool:
    """Tell whether a value is what DequantizeLinear returns, moved or not."""
    return is_made(unmoved(value), "DequantizeLinear")


def _is_token(token: ir.Value, expanded: ir.Value | None) -> bool:
    """Tell whether a stored tensor is repeated along the batch, and in no other way."""
    return (
        expanded is not None
        and token.shape is not None
        and expanded.shape is not None
        and token.shape.rank() == expanded.shape.rank() == 3
        and token.shape[0] == 1
        and list(token.shape)[1:] == list(expanded.shape)[1:]
    )


def _rank(value: ir.Value | None) -> int | None:
    return value.shape.rank() if value and value.shape is not None else None
