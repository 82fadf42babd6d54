"""A model as one graph of operations, in evaluation mode; and the names of what it returns."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..quantization.caches import without_caches
from ..quantization.running import evaluating
from .dimensions import Dynamic, axes_of, check_free
from .integer_weights import ONNX, Layout, integer_weights

BATCH = MappingProxyType({0: "batch"})


def traced(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dynamic: Dynamic,
    dtype: str = "int8",
    layout: Layout = ONNX,
) -> torch.export.ExportedProgram:
    """Trace a model in evaluation mode; if it is quantized, with weights as they are asked for."""
    # not torch.export.Dim(name), which would have to know how many tokens a model takes; nor
    # DYNAMIC, with which texts beside images could not have tokens, whose channels are fixed
    size = torch.export.Dim.AUTO

    def sizes(name: str, given: Any) -> Any:
        free = axes_of(name, dynamic)
        return pytree.tree_map(lambda x: {axis: size for axis in free if axis < x.dim()}, given)

    with (
        torch.no_grad(),
        evaluating(model),
        without_caches(model),
        integer_weights(model, dtype, layout),
    ):
        program = torch.export.export(
            model,
            args,
            kwargs,
            dynamic_shapes=sizes("", args) or {name: sizes(name, x) for name, x in kwargs.items()},
            strict=False,  # else the functional sites would not be seen
        )
    check_free(program, dynamic)
    return program


def outputs_by_name(outputs: Any) -> dict[str, Any]:
    """Name what a model returns as a file of it does: by its keys, or "output".

    Several tensors of one name are numbered.
    """
    if not isinstance(outputs, Mapping):
        outputs = {"output": outputs}
    found: dict[str, Any] = {}
    for key, value in outputs.items():
        leaves = pytree.tree_leaves(value)
        found |= {key if len(leaves) == 1 else f"{key}_{i}": leaf for i, leaf in enumerate(leaves)}
    return found
