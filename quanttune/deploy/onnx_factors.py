"""Roundings in front of a multiplication by a power of two, such as that of attention's queries."""

import math

import numpy as np
import onnx_ir as ir

from .onnx_moves import unmoved
from .onnx_values import is_made, stored


def round_before_factors(graph: ir.Graph) -> None:
    """Divide a rounding's scale by what its input is multiplied by, in place of the multiplication.

    The codes are the same, since a power of two changes no digits. ONNX Runtime then rounds before
    it moves: queries of 64 channels are multiplied by 1/8, which keeps them floats while they are
    cut out and transposed. What was rounded before stays as it is: it would be rounded once where
    the model rounds twice.
    """
    for quantize in graph:
        multiply = quantize.inputs[0].producer() if quantize.op_type == "QuantizeLinear" else None  # type: ignore[union-attr]
        if multiply is None or multiply.op_type != "Mul":
            continue
        value, factor = multiply.inputs
        power = _power_of_two(factor)
        if power is None or is_made(unmoved(value), "DequantizeLinear"):
            continue
        divisor = stored(graph, np.float32(power))
        divide = ir.node("Div", [quantize.inputs[1], divisor])
        divide.outputs[0].type, divide.outputs[0].shape = (
            ir.TensorType(ir.DataType.FLOAT),
            ir.Shape([]),
        )
        graph.insert_before(quantize, divide)
        quantize.replace_input_with(0, value)
        quantize.replace_input_with(1, divide.outputs[0])
        if not multiply.outputs[0].uses() and not multiply.outputs[0].is_graph_output():
            graph.remove(multiply, safe=True)


def _power_of_two(factor: ir.Value | None) -> float | None:
    """Return the number that a graph holds, if multiplying by it changes no digits."""
    if factor is None or factor.const_value is None or factor.const_value.size != 1:
        return None
    number = factor.const_value.numpy().item()
    is_usual = 2.0**-20 <= number <= 2.0**20  # neither the values nor the scale leave the range
    return number if is_usual and math.frexp(number)[0] == 0.5 else None
