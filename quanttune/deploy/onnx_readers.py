"""A rounding for each product that reads what a graph rounds."""

import re
from collections.abc import Iterator
from itertools import product

import onnx_ir as ir

from .onnx_moves import MOVES
from .onnx_values import PRODUCTS, is_made


def original(codes: str) -> str:
    """Return the name of the codes that codes of this name are, made once more for a reader."""
    return re.sub(r"#\d+$", "", codes)


def copy_roundings(graph: ir.Graph) -> None:
    """Round anew for each further product that reads what DequantizeLinear returns, in place.

    ONNX Runtime 1.32 multiplies int8 activations by making uint8 of them, and does so only where
    codes have one reader; so it is with what a product returns, whoever reads it. It would make one
    of nodes that are equal: of a scale for the whole tensor the axis says nothing, so each copy has
    one of its own.
    """
    for dequantize in reversed(list(graph)):  # what reads comes first: it becomes several readers
        codes = dequantize.inputs[0] if dequantize.op_type == "DequantizeLinear" else None
        if codes is None or not is_made(codes, "QuantizeLinear") or len(codes.uses()) > 1:
            continue
        uses = list(dequantize.outputs[0].uses())
        if any(is_made(codes.producer().inputs[0], product) for product in PRODUCTS):  # type: ignore[union-attr]
            alone = uses
        else:
            alone = [use for use in uses if _leads_to_product(use[0])]
        others = alone if len(alone) < len(uses) else alone[1:]
        for number, (attributes, use) in enumerate(
            zip(_attributes(codes), others, strict=False), 1
        ):
            _copy(graph, dequantize, f"{codes.name}#{number}", attributes, use)


def _leads_to_product(reader: ir.Node) -> bool:
    if reader.op_type not in {*MOVES, "QuantizeLinear", "DequantizeLinear"}:
        return reader.op_type in PRODUCTS
    return any(_leads_to_product(use[0]) for moved in reader.outputs for use in moved.uses())


def _attributes(codes: ir.Value) -> Iterator[dict[str, int]]:
    """Yield the attributes of QuantizeLinear that say nothing here, but for the defaults."""
    rank = codes.shape.rank() if codes.shape is not None else 0
    for saturate, axis in product((1, 0), range(-rank, rank)):
        if (saturate, axis) != (1, 1):
            yield {"axis": axis, "saturate": saturate}


def _copy(
    graph: ir.Graph,
    dequantize: ir.Node,
    name: str,
    attributes: dict[str, int],
    use: tuple[ir.Node, int],
) -> None:
    quantize = dequantize.inputs[0].producer()  # type: ignore[union-attr]
    assert quantize is not None
    codes = ir.node("QuantizeLinear", quantize.inputs, attributes)
    floats = ir.node("DequantizeLinear", [codes.outputs[0], *dequantize.inputs[1:]])
    for copied, node in ((codes, quantize), (floats, dequantize)):
        copied.outputs[0].shape, copied.outputs[0].type = (
            node.outputs[0].shape,
            node.outputs[0].type,
        )
    codes.outputs[0].name = name
    graph.insert_after(dequantize, [codes, floats])
    reader, index = use
    reader.replace_input_with(index, floats.outputs[0])
