"""Codes, not floats, through the operators of a graph that only move values."""

import onnx_ir as ir

MOVES = {"Gather", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"}


def unmoved(value: ir.Value | None) -> ir.Value | None:
    """Return the value that operators which only move have made a value of."""
    while value is not None and (producer := value.producer()) and producer.op_type in MOVES:
        value = producer.inputs[0]
    return value


def move_codes(graph: ir.Graph) -> None:
    """Put DequantizeLinear behind the operators that only move what it returns, in place.

    A byte moves instead of a float, and of what is cut out only that much becomes floats. Left to
    itself ONNX Runtime makes floats of the whole output of a qkv product, for each part again.
    """
    waiting = [node for node in graph if node.op_type == "DequantizeLinear" and _is_scalar(node)]
    while waiting:
        dequantize = waiting.pop()
        floats = dequantize.outputs[0]
        readers = [] if floats.is_graph_output() else list(floats.uses())
        if not readers or not all(_moves(reader, index) for reader, index in readers):
            continue
        for reader, _ in readers:
            reader.replace_input_with(0, dequantize.inputs[0])
            waiting += [_dequantized(graph, reader, moved, dequantize) for moved in reader.outputs]
        graph.remove(dequantize, safe=True)


def _moves(reader: ir.Node, index: int) -> bool:
    inside = not any(moved.is_graph_output() for moved in reader.outputs)
    return reader.op_type in MOVES and index == 0 and inside


def _is_scalar(dequantize: ir.Node) -> bool:
    scale = dequantize.inputs[1]
    return scale is not None and scale.shape is not None and len(scale.shape) == 0


def _dequantized(graph: ir.Graph, reader: ir.Node, moved: ir.Value, like: ir.Node) -> ir.Node:
    """Make floats of what a reader moved, for all that take it."""
    codes = like.inputs[0]
    takers = list(moved.uses())
    node = ir.node("DequantizeLinear", [moved, *like.inputs[1:]])
    floats = node.outputs[0]
    floats.shape, floats.type = moved.shape, moved.type
    moved.type = codes.type if codes else None
    graph.insert_after(reader, node)
    for taker, index in takers:
        taker.replace_input_with(index, floats)
    return node
