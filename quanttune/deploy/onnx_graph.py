"""What is done to the graph that torch.onnx made, before it is written."""

import ast
import re
from collections import Counter
from collections.abc import Mapping
from itertools import chain
from typing import Any

import numpy as np
import onnx_ir as ir

from .onnx_biases import fuse_biases
from .onnx_factors import round_before_factors
from .onnx_floats import keep_floats, keep_from_others, keep_whole
from .onnx_limits import drop_limits
from .onnx_moves import move_codes
from .onnx_readers import copy_roundings
from .onnx_sums import keep_sums
from .onnx_values import PRODUCTS, stored

SCOPES = "pkg.torch.onnx.name_scopes"  # the modules that were being called, outermost first


def finish(model: ir.Model, dimensions: Mapping[str, str], target: str, act_dtype: str) -> None:
    """Name dimensions and products, drop the machine's traces, let integers be integers.

    Args:
        dimensions: names of dimensions that replace those of the trace.
        target: who runs it.
        act_dtype: type of the codes. Those of uint8 are written as ONNX Runtime likes them, those
            of int8 as others do: OpenVINO 2026.4 computes in float what is not made floats at once.
    """
    _name_dimensions(model.graph, dimensions)
    _name_products(model.graph)
    nodes, values = model.graph.all_nodes(), _values(model.graph)
    owners: list[Any] = [model, model.graph, *nodes, *values]
    for owner in owners:
        owner.metadata_props.clear()
    drop_limits(model.graph)
    _free_products(model.graph)
    if act_dtype == "uint8":
        move_codes(model.graph)
    keep_sums(model.graph)
    if act_dtype == "int8":
        copy_roundings(model.graph)
        keep_from_others(model.graph)
        if target.startswith("onnxruntime"):  # OpenVINO moves the codes, and would be slower
            keep_whole(model.graph)
    if target.startswith("onnxruntime"):  # the others have not been seen to gain by it
        round_before_factors(model.graph)
    keep_floats(model.graph)
    if target == "onnxruntime-cpu":
        fuse_biases(model)


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
    """Make Min and Max of a Clip or Relu behind a product, which ONNX Runtime else computes in
    float.
    """
    for node in graph:
        if node.op_type not in ("Clip", "Relu"):
            continue
        x, *bounds = node.inputs  # one bound, where a model has written it so
        producer = x.producer() if x else None
        if not (producer and producer.op_type == "MatMul"):
            continue
        if node.op_type == "Relu":
            bounds = [stored(graph, np.float32(0), "zero")]
        low, high = (*bounds, None, None)[:2]
        made: list[ir.Node] = []
        for operator, bound in (("Min", high), ("Max", low)):
            if bound is not None:
                made.append(ir.node(operator, [made[-1].outputs[0] if made else x, bound]))
        ir.convenience.replace_nodes_and_values(
            graph, node, [node], made, node.outputs, made[-1].outputs
        )


def _values(graph: ir.Graph) -> list[ir.Value]:
    produced = chain.from_iterable(node.outputs for node in graph.all_nodes())
    return [*graph.inputs, *graph.initializers.values(), *produced]
