"""Values of a graph: what makes them, and stored ones that changes of the graph need."""

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

PRODUCTS = ("MatMul", "Gemm", "Conv")


def is_made(value: ir.Value | None, op_type: str) -> bool:
    """Tell whether an operator of that type puts a value out."""
    producer = value.producer() if value else None
    return producer is not None and producer.op_type == op_type


def stored(graph: ir.Graph, array: npt.NDArray[Any] | np.generic, name: str = "") -> ir.Value:
    """Return a tensor that the graph holds, made once; by default its name tells its elements."""
    name = name or "_".join(["constant", array.dtype.name, *map(str, array.ravel())])
    if name not in graph.initializers:
        graph.initializers[name] = ir.Value(name=name, const_value=ir.tensor(array, name=name))
    return graph.initializers[name]
