"""Tensors of different grids side by side, for runtimes that put codes there and not values."""

from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node

_aten = torch.ops.aten
_rounding = torch.ops.quantized_decomposed
_MOVES = {
    _aten.clone.default, _aten.expand.default, _aten.permute.default, _aten.select.int,
    _aten.slice.Tensor, _aten.squeeze.dim, _aten.transpose.int, _aten.unsqueeze.default,
    _aten.view.default,
}  # fmt: skip


def keep_tokens(program: ExportedProgram) -> None:
    """Write a concatenation of tensors that are not of one grid as a sum of padded ones, in place.

    LiteRT 2.3 rounds all to the grid of one: a class token, which is not rounded, to that of the
    patches beside it, where a small one becomes 0 (findings/litert_concatenated_codes.sh).
    """
    for cat in program.graph.find_nodes(op="call_function", target=_aten.cat.default):
        parts, axis = cat.args[0], cat.args[1] if len(cat.args) > 1 else 0
        if len({_grid(part) for part in parts}) == 1:
            continue
        with program.graph.inserting_before(cat):
            cat.replace_all_uses_with(_sum_of(program, parts, axis % cat.meta["val"].dim()))
        program.graph.erase_node(cat)
    program.graph.lint()


def _grid(node: Node) -> Any:
    """Return the grid that a tensor was rounded to, if it was only moved since; or None."""
    while node.target in _MOVES:
        node = node.all_input_nodes[0]
    return node.args[1:] if node.target is _rounding.dequantize_per_tensor.default else None


def _sum_of(program: ExportedProgram, parts: list[Node], axis: int) -> Node:
    sizes = [part.meta["val"].shape[axis] for part in parts]
    trailing = [0, 0] * (parts[0].meta["val"].dim() - 1 - axis)
    total: Node | None = None
    for i, part in enumerate(parts):
        widths = [*trailing, sum(sizes[:i]), sum(sizes[i + 1 :])]
        padded = _call(program, _aten.constant_pad_nd.default, part, widths, 0.0)
        total = _call(program, _aten.add.Tensor, total, padded) if total else padded
    assert total is not None
    return total


def _call(program: ExportedProgram, operation: Any, *args: Any) -> Node:
    node = program.graph.call_function(operation, args)
    values = [arg.meta["val"] if isinstance(arg, Node) else arg for arg in args]
    node.meta["val"] = operation(*values)
    return node
