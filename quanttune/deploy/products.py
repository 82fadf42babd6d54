"""Which products of an ONNX file ONNX Runtime computes in integers, and why not the others."""

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from .external_data import LARGEST
from .onnx_biases import FUSED
from .onnx_model import OnnxModel, has_vnni, read
from .onnx_values import PRODUCTS
from .operands import FLOAT, PROBABILITIES, WIDE, Operand, Operands

if TYPE_CHECKING:
    import onnx

_INTEGER = {
    "MatMulIntegerToFloat", "QLinearMatMul", "QGemm", "QLinearConv", "MatMulInteger", "ConvInteger",
    "DynamicQuantizeMatMul",
}  # fmt: skip
_BESIDE = {"QuantizeLinear", "DequantizeLinear", "Transpose"}  # made of a product, and no product
_STATES = {
    FLOAT: " is not rounded",
    WIDE: " is rounded to more than 8 bits",
    PROBABILITIES: ", attention's probabilities, is not rounded: coverage='full' rounds it",
}
_UNKNOWN = "the file does not show why"
_LOST = "ONNX Runtime made it a part of another operator, which does not name it"
_CONVOLVED = "ONNX Runtime convolves integers only where the output is rounded at once, to 8 bits"
_SIGNED = "the file has int8 activations: export it with act_dtype='uint8' for ONNX Runtime"
REMARKS = (*_STATES.values(), _UNKNOWN, _LOST, _CONVOLVED, _SIGNED)


@dataclass(frozen=True)
class Product:
    """A product: its module, and the operator that ONNX Runtime computes."""

    name: str
    operator: str | None  # None: it is not to be found any more
    remark: str | None  # why it is not one of integers

    @property
    def is_integer(self) -> bool:
        return self.operator in _INTEGER


@dataclass(frozen=True)
class Explanation:
    """The products of a file, and how many roundings are operators of their own."""

    products: tuple[Product, ...]
    roundings: dict[str, int]  # QuantizeLinear and DequantizeLinear in ONNX Runtime's graph
    has_vnni: bool | None  # None: no x86 processor, or unknown


def explain(path: str | Path) -> Explanation:
    """Tell which products of a file ONNX Runtime computes in integers, and why not the others.

    The reasons are read from the file. What ONNX Runtime does depends on the processor, so call it
    where the model is to run.

    Raises:
        FileNotFoundError: there is no such file. ValueError: it is no whole ONNX file, or larger
            than 2 GB.
    """
    model = read(path)
    if model.ByteSize() > LARGEST:
        raise ValueError(f"{path} is larger than 2 GB: explain a model of fewer layers")
    products = {
        str(i): n for i, n in enumerate(model.graph.node) if n.op_type in (*PRODUCTS, FUSED)
    }
    if not products:
        raise ValueError(f"{path} has no product: no {', '.join(PRODUCTS)}")
    names = {key: node.name or node.output[0] for key, node in products.items()}
    for key, node in products.items():
        node.name = f"<{key}>"  # ONNX Runtime keeps it as a part of the name of what it makes
    optimized = _optimized(model)
    operators, operands = _operators(optimized, products), Operands(model.graph)
    found = (
        _product(names[key], node, operators.get(key), operands) for key, node in products.items()
    )
    counts = Counter(node.op_type for node in optimized.graph.node)
    roundings = {kind: counts[kind] for kind in ("QuantizeLinear", "DequantizeLinear")}
    return Explanation(tuple(found), roundings, has_vnni())


def _optimized(model: "onnx.ModelProto") -> "onnx.ModelProto":
    with TemporaryDirectory() as folder:
        path = Path(folder) / "optimized.onnx"
        OnnxModel(model, optimized=path)
        return read(path)


def _operators(
    optimized: "onnx.ModelProto", products: dict[str, "onnx.NodeProto"]
) -> dict[str, str]:
    """Return what became of each product that is still named."""
    # convolutions in a layout of blocks, always floats, are named after the output instead
    blocked = {f"{node.output[0]}_nchwc": key for key, node in products.items()}
    found = {}
    for node in optimized.graph.node:
        if node.op_type in _BESIDE:
            continue
        for key in re.findall(r"<(\d+)>", node.name):
            found[key] = node.op_type
        if node.op_type == "Conv" and node.name in blocked:
            found[blocked[node.name]] = node.op_type
    return found


def _product(
    name: str, node: "onnx.NodeProto", operator: str | None, operands: Operands
) -> Product:
    if operator is None:
        return Product(name, None, _LOST)
    if operator in _INTEGER:
        return Product(name, operator, None)
    left, right = operands.of(node)
    reason = _of_operands(left, right) or _of_output(node, left, right, operands)
    return Product(name, operator, reason)


def _of_operands(left: Operand, right: Operand) -> str | None:
    sides = ("input", "weight") if right.is_stored else ("left operand", "right operand")
    reasons = [
        f"its {side}{_STATES[operand.state]}"
        for side, operand in zip(sides, (left, right), strict=True)
        if operand.state in _STATES
    ]
    # how a weight is stored depends on the input
    return "; ".join(reasons[:1] if right.is_stored else reasons) or None


def _of_output(node: "onnx.NodeProto", left: Operand, right: Operand, operands: Operands) -> str:
    if node.op_type == "Conv" and operands.readers(node) != {"QuantizeLinear"}:
        return _CONVOLVED
    if any(side.state == "int8" and not side.is_stored for side in (left, right)):
        return _SIGNED
    return _UNKNOWN
