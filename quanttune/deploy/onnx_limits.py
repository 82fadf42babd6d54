"""Limits of codes of fewer than 8 bits, where they do nothing."""

import onnx_ir as ir

from .onnx_moves import unmoved
from .onnx_values import is_made


def drop_limits(graph: ir.Graph) -> None:
    """Take out each Clip of what was rounded within the same limits before, in place.

    Between two roundings to one grid it would keep runtimes from making one of both.
    """
    for clip in graph:
        x = clip.inputs[0] if clip.op_type == "Clip" else None
        if x is not None and _limits(x) == tuple(clip.inputs[1:]):
            clip.outputs[0].replace_all_uses_with(x)
            graph.remove(clip, safe=True)


def _limits(value: ir.Value | None) -> tuple[ir.Value | None, ...] | None:
    """Return the limits within which a value was rounded, if it was only moved since."""
    value = unmoved(value)
    for kind in ("DequantizeLinear", "QuantizeLinear"):
        if not is_made(value, kind):
            return None
        value = value.producer().inputs[0]  # type: ignore[union-attr]
    return tuple(value.producer().inputs[1:]) if is_made(value, "Clip") else None  # type: ignore[union-attr]
