"""Products of codes that add their bias themselves: an operator of ONNX Runtime's own, for CPUs."""

import numpy as np
import onnx_ir as ir

from .integer_weights import CENTERS
from .onnx_values import is_made, stored

DOMAIN = "com.microsoft"
FUSED = "MatMulIntegerToFloat"


def fuse_biases(model: ir.Model) -> None:
    """Make one operator of each product of codes and a stored weight with its bias, in place.

    Of QuantizeLinear and DequantizeLinear ONNX Runtime 1.32 makes the same operator, but leaves the
    bias outside: one pass over memory more for each Linear. It multiplies activations of uint8 on
    any x86 processor, those of int8 by loops that are not made for it, so the operator reads uint8.
    """
    for add in list(model.graph):
        product = add.inputs[0].producer() if add.op_type == "Add" else None  # type: ignore[union-attr]
        if product is None or product.op_type != "MatMul" or len(product.outputs[0].uses()) > 1:
            continue
        bias, left, right = _bias(add.inputs[1]), *(_dequantized(x) for x in product.inputs)
        if bias is None or left is None or right is None or not _is_weight(right):
            continue
        if (read := _unsigned(model.graph, left)) is None:
            continue
        codes, scale, zero = read
        weight, weight_scale, weight_zero = right.inputs
        inputs = [codes, weight, scale, weight_scale, zero, weight_zero, bias]
        fused = ir.node(FUSED, inputs, domain=DOMAIN, name=product.name)
        ir.convenience.replace_nodes_and_values(
            model.graph, add, [add, product], [fused], add.outputs, fused.outputs
        )
        for floats in (left, right):
            if not floats.outputs[0].uses():
                model.graph.remove(floats, safe=True)
        model.opset_imports[DOMAIN] = 1


def _bias(value: ir.Value | None) -> ir.Value | None:
    """Return the stored row that is added, without dimensions that were put in front."""
    if value is not None and is_made(value, "Unsqueeze"):
        value = value.producer().inputs[0]  # type: ignore[union-attr]
    is_row = value is not None and value.is_initializer() and len(value.shape or ()) == 1
    return value if is_row else None


def _dequantized(value: ir.Value | None) -> ir.Node | None:
    return value.producer() if is_made(value, "DequantizeLinear") else None  # type: ignore[union-attr]


def _is_weight(dequantize: ir.Node) -> bool:
    codes, _, zero = (*dequantize.inputs, None)[:3]
    is_matrix = codes is not None and codes.is_initializer() and len(codes.shape or ()) == 2
    return is_matrix and zero is not None


def _unsigned(graph: ir.Graph, dequantize: ir.Node) -> list[ir.Value | None] | None:
    """Return codes, scale and zero point as uint8, if they are or can be made so."""
    codes, scale, zero = (*dequantize.inputs, None)[:3]
    if codes is None or zero is None or zero.const_value is None:
        return None
    number = zero.const_value.numpy()
    if number.ndim or number.dtype == np.uint8:
        return None if number.ndim else [codes, scale, zero]
    quantize = codes.producer()
    if not is_made(codes, "QuantizeLinear") or len(codes.uses()) > 1 or codes.is_graph_output():
        return None  # somebody else reads int8
    moved = stored(graph, np.uint8(CENTERS["uint8"] + number.item()))
    quantize.replace_input_with(2, moved)  # type: ignore[union-attr]
    codes.type = ir.TensorType(ir.DataType.UINT8)
    return [codes, scale, moved]
