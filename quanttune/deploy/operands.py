"""What the products of an exported graph multiply: which operands are integers."""

from collections import defaultdict
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import onnx

FLOAT, WIDE, PROBABILITIES = "float", "wide", "probabilities"
INTEGERS = "uint8", "int8"  # the other states of an operand
_MOVES = {
    "Concat", "Expand", "Flatten", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose",
    "Unsqueeze",
}  # fmt: skip


class Operand(NamedTuple):
    """What a product multiplies: its state, and whether it is a weight, stored in the file."""

    state: str
    is_stored: bool


class Operands:
    """The operands of the products of a graph, found by going back to what made them."""

    def __init__(self, graph: "onnx.GraphProto") -> None:
        self._makers = {name: node for node in graph.node for name in node.output}
        self._stored = {tensor.name: tensor for tensor in graph.initializer}
        self._readers = defaultdict(set)
        for node in graph.node:
            for name in node.input:
                self._readers[name].add(node.op_type)

    def of(self, node: "onnx.NodeProto") -> tuple[Operand, Operand]:
        """Return what a product multiplies, left and right."""
        left, right = (self._operand(name) for name in node.input[:2])
        return left, right

    def readers(self, node: "onnx.NodeProto") -> set[str]:
        """Return the kinds of operators that take in what a node puts out."""
        return self._readers[node.output[0]]

    def _operand(self, name: str) -> Operand:
        while (node := self._makers.get(name)) and node.op_type in _MOVES:
            name = node.input[0]
        if node is None:
            is_wide = name.endswith(".weight_quantizer.codes")  # those of 8 bits are dequantized
            return Operand(WIDE if is_wide else FLOAT, name in self._stored)
        if node.op_type == "DequantizeLinear":
            return self._dequantized(node)
        if node.op_type == "Softmax":
            return Operand(PROBABILITIES, False)
        is_wide = node.op_type == "Mul" and self._is_rounded(node.input[0])
        return Operand(WIDE if is_wide else FLOAT, False)

    def _dequantized(self, node: "onnx.NodeProto") -> Operand:
        if codes := self._stored.get(node.input[0]):
            return Operand(INTEGERS[codes.data_type == codes.INT8], True)
        zero_point = self._stored.get(node.input[2]) if len(node.input) > 2 else None
        is_signed = zero_point is not None and zero_point.data_type == zero_point.INT8
        return Operand(INTEGERS[is_signed], False)

    def _is_rounded(self, name: str) -> bool:
        clip = self._makers.get(name)
        steps = self._makers.get(clip.input[0]) if clip and clip.op_type == "Clip" else None
        return steps is not None and steps.op_type == "Round"
