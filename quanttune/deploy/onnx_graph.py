"""What is done to the graph that torch.onnx made, before it is written."""

import ast
import re
from collections import Counter
from collections.abc import Mapping
from itertools import chain
from typing import Any

import numpy as np
import onnx_ir as ir

from .onnx_moves import move_codes
from .onnx_readers import copy_roundings
from .onnx_sums import is_made, keep_sums

SCOPES = "pkg.torch.onnx.name_scopes"  # the modules that were being called, outermost first
LOWEST = "lowest"  # the name of a float that no value is below
PRODUCTS = ("MatMul", "Gemm", "Conv")


def finish(model: ir.Model, dimensions: Mapping[str, str], act_dtype: str) -> None:
    """Name dimensions and products, drop the machine's traces, let integers be integers.

    Args:
        dimensions: names of dimensions that replace those of the trace.
        act_dtype: type of the codes. Those of uint8 are written as ONNX Runtime likes them, those
            of int8 as others do: OpenVINO 2026.4 computes in float what is not made floats at once.
    """
    _name_dimensions(model.graph, dimensions)
    _name_products(model.graph)
    nodes, values = model.graph.all_nodes(), _values(model.graph)
    owners: list[Any] = [model, model.graph, *nodes, *values]
    for owner in owners:
        owner.metadata_props.clear()
    _free_products(model.graph)
    if act_dtype == "uint8":
        move_codes(model.graph)
    keep_sums(model.graph)
    if act_dtype == "int8":
        copy_roundings(model.graph)
    _keep_floats(model.graph, act_dtype)


def name_codes(graph: ir.Graph) -> None:
    """Call what QuantizeLinear returns by its site; a site's later calls get a number.

    Equal nodes are still there, so that the numbers are those of the calls.
    """
    calls: Counter[str] = Counter()
    for node in graph:
        if node.op_type == "QuantizeLinear":
            node.outputs[0].name = _numbered(f"{_module(node)}.codes", calls)


def _name_products(graph: ir.Graph) -> None:
    """Call products by the module that multiplies; its later products get a number."""
    calls: Counter[str] = Counter()
    for node in graph:
        if node.op_type in PRODUCTS and SCOPES in node.metadata_props:
            node.name = _numbered(f"{_module(node)}.{node.op_type.lower()}".lstrip("."), calls)


def _module(node: ir.Node) -> str:
    """Return the name of the module that was being called."""
    name: str = ast.literal_eval(node.metadata_props[SCOPES])[-2]
    return name


def _numbered(name: str, calls: Counter[str]) -> str:
    """Return a name; where it was there before, with a number."""
    calls[name] += 1
    return f"{name}_{calls[name] - 1}" if calls[name] > 1 else name


def _name_dimensions(graph: ir.Graph, names: Mapping[str, str]) -> None:
    def named(size: int | ir.SymbolicDim) -> int | str | None:
        if isinstance(size, int) or size.value is None:
            return size if isinstance(size, int) else None
        if size.value.isdigit():  # of a trace that found only later that it is fixed
            return int(size.value)
        return re.sub(r"\w+", lambda word: names.get(word[0], word[0]), str(size.value))

    for value in _values(graph):
        if value.shape and not value.shape.is_static():
            value.shape = ir.Shape([named(size) for size in value.shape])


def _free_products(graph: ir.Graph) -> None:
    """Make Min and Max of a Clip behind a product, which ONNX Runtime else computes in float."""
    for node in graph:
        if node.op_type != "Clip":
            continue
        x, *bounds = node.inputs  # one bound, where a model has written it so
        producer = x.producer() if x else None
        if not (producer and producer.op_type == "MatMul"):
            continue
        low, high = (*bounds, None, None)[:2]
        made: list[ir.Node] = []
        for operator, bound in (("Min", high), ("Max", low)):
            if bound is not None:
                made.append(ir.node(operator, [made[-1].outputs[0] if made else x, bound]))
        ir.convenience.replace_nodes_and_values(
            graph, node, [node], made, node.outputs, made[-1].outputs
        )


def _keep_floats(graph: ir.Graph, act_dtype: str) -> None:
    """Put a Max that changes nothing behind what is to be computed in float.

    ONNX Runtime else makes integer operators of a softmax between codes, which is slower and not
    what is simulated, and of a convolution whose weight it then rounds to 8 bits itself. An output
    of the graph it returns rounded, where a transposed copy of it is rounded. Of two roundings in
    a row, to grids that differ, it makes one. A product that is rounded twice it computes in float.
    OpenVINO 2026.4 adds a LayerNorm's epsilon to the variance of int8 codes, not of what they mean.
    """
    lowest = ir.Value(name=LOWEST, const_value=ir.tensor(np.float32(-np.inf), name=LOWEST))
    for node in graph:
        of_floats = node.op_type == "Conv" and not _is_dequantized(node.inputs[1])
        if (of_floats or node.op_type == "Softmax") and _is_dequantized(node.inputs[0]):
            _keep_float(graph, node.outputs[0], "QuantizeLinear", lowest)
        if node.op_type == "MatMul" and len(node.outputs[0].uses()) > 1:
            _keep_float(graph, node.outputs[0], "QuantizeLinear", lowest)
        if node.op_type == "DequantizeLinear" and act_dtype == "int8":
            _keep_float(graph, node.outputs[0], "LayerNormalization", lowest)
        if node.op_type == "DequantizeLinear" and is_made(node.inputs[0], "QuantizeLinear"):
            _keep_float(graph, node.outputs[0], "QuantizeLinear", lowest, tuple(node.inputs[1:]))
        for output in node.outputs:
            if output.is_graph_output() and output.dtype == ir.DataType.FLOAT:
                _keep_float(graph, output, "Transpose", lowest)


def _keep_float(
    graph: ir.Graph,
    value: ir.Value,
    reader_type: str,
    lowest: ir.Value,
    grid: tuple[ir.Value | None, ...] | None = None,
) -> None:
    """Let the readers of one type take a value through a Max, but for those that have the grid."""
    of_type = [use for use in value.uses() if use[0].op_type == reader_type]
    readers = [use for use in of_type if tuple(use[0].inputs[1:]) != grid]
    producer = value.producer()
    if not readers or producer is None:
        return
    greatest = ir.node("Max", [value, lowest])
    greatest.outputs[0].shape, greatest.outputs[0].type = value.shape, value.type
    for reader, index in readers:
        reader.replace_input_with(index, greatest.outputs[0])
    graph.insert_after(producer, greatest)
    graph.initializers[LOWEST] = lowest


def _is_dequantized(value: ir.Value | None) -> bool:
    return is_made(value, "DequantizeLinear")


def _values(graph: ir.Graph) -> list[ir.Value]:
    produced = chain.from_iterable(node.outputs for node in graph.all_nodes())
    return [*graph.inputs, *graph.initializers.values(), *produced]
