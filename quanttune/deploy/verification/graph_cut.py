"""The sites of an exported graph: where it rounds and with what, and the graph cut there."""

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from ..integer_weights import CENTERS
from ..onnx_readers import original

CODES = ".codes"
Grid = tuple[float, int]  # scale and zero point


@dataclass(frozen=True)
class Rounding:
    """A QuantizeLinear, its copies for further readers, and what reads their codes."""

    codes: str  # name of what it returns: <site>.codes, of later calls <site>.codes_1, ...
    dtype: np.dtype[Any]  # of the codes
    grids: tuple[Grid, ...]  # its own, its copies', and those of what makes floats of the codes
    shape: tuple[int, ...]  # as the file declares it; 0 where any size may be

    @property
    def center(self) -> int:
        if self.dtype.name not in CENTERS:
            raise ValueError(f"{self.codes} must be int8 or uint8, got {self.dtype.name}")
        return CENTERS[self.dtype.name]

    @property
    def site(self) -> str:
        return parsed(self.codes)[0]


def parsed(codes: str) -> tuple[str, int]:
    """Return the site and the number of the call that codes are named after."""
    site, _, number = codes.rpartition(CODES)
    return site, int(number[1:] or 0)


def stored_tensors(model: onnx.ModelProto) -> dict[str, np.ndarray[Any, Any]]:
    """Return the tensors of a graph by name."""
    found = [(tensor.name, tensor) for tensor in model.graph.initializer]
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            found.append((node.output[0], node.attribute[0].t))
    return {name: numpy_helper.to_array(tensor) for name, tensor in found}


def roundings(
    model: onnx.ModelProto, tensors: dict[str, np.ndarray[Any, Any]]
) -> Iterator[Rounding]:
    """Yield where a graph rounds, in the order in which it computes."""
    readers = _readers(model)
    declared = {value.name: value.type.tensor_type.shape.dim for value in model.graph.value_info}
    divided = {n.output[0]: n.input[0] for n in model.graph.node if n.op_type == "Div"}
    for codes, nodes in _makers(model).items():
        read = [n for n in readers[codes] if n.op_type == "DequantizeLinear"]
        grids = tuple(_grid(n, tensors, divided) for n in (*nodes, *read))
        zero_point = tensors.get("".join(nodes[0].input[2:]), np.uint8(0))
        shape = tuple(size.dim_value for size in declared.get(codes, ()))
        yield Rounding(codes, zero_point.dtype, grids, shape)


def input_for(codes: str) -> str:
    """Return the name of the input that stands for a site's codes in a graph that was cut."""
    return codes.replace(CODES, ".fed")


def cut(model: onnx.ModelProto, sites: list[Rounding]) -> None:
    """Cut a graph at its sites, in place: it returns their codes, and goes on with other ones.

    What follows a site takes the input `fed` in place of its codes.
    """
    readers = _readers(model)
    for rounding in sites:
        kind = helper.np_dtype_to_tensor_dtype(rounding.dtype)
        other = input_for(rounding.codes)
        for node in readers[rounding.codes]:
            names = [other if original(name) == rounding.codes else name for name in node.input]
            del node.input[:]
            node.input.extend(names)
        model.graph.input.append(helper.make_tensor_value_info(other, kind, None))
        model.graph.output.append(helper.make_tensor_value_info(rounding.codes, kind, None))


def _makers(model: onnx.ModelProto) -> dict[str, list[onnx.NodeProto]]:
    """Return what rounds by the name of the codes, the copies last."""
    makers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear" and CODES in node.output[0]:
            makers[original(node.output[0])].append(node)
    return makers


def _readers(model: onnx.ModelProto) -> dict[str, list[onnx.NodeProto]]:
    """Return what reads a tensor, or a copy of it, by its name."""
    readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
    for node in model.graph.node:
        for name in {original(name) for name in node.input}:
            readers[name].append(node)
    return readers


def _grid(
    node: onnx.NodeProto, tensors: dict[str, np.ndarray[Any, Any]], divided: dict[str, str]
) -> Grid:
    """Return a node's grid; where the scale is divided by a factor, that of what was multiplied."""
    name = divided.get(node.input[1], node.input[1])
    scale = tensors.get(name, np.float32(math.nan))
    zero_point = tensors.get("".join(node.input[2:]), np.uint8(0))
    return scale.item(), zero_point.item()
