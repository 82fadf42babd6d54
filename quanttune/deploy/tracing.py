"""A model as one graph of operations, in evaluation mode; and the names of what it returns."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..quantization.running import evaluating
from .caches import without_caches
from .dimensions import check_free
from .integer_weights import ONNX, Layout, integer_weights

BATCH = MappingProxyType({0: "batch"})


def traced(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dynamic: Mapping[int, str],
    dtype: str = "int8",
    layout: Layout = ONNX,
) -> torch.export.ExportedProgram:
    """Trace a model in evaluation mode; if it is quantized, with weights as they are asked for."""
    # not torch.export.Dim(name), which would have to know how many tokens a model takes; nor
    # DYNAMIC, with which texts beside images could not have tokens, whose channels are fixed
    size = torch.export.Dim.AUTO
    shapes = pytree.tree_map(
        lambda x: {axis: size for axis in dynamic if axis < x.dim()}, (args, kwargs)
    )
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
            dynamic_shapes=shapes[0] or shapes[1],
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
