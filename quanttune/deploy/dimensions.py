"""The dimensions of inputs that may have any size, and what a file calls them."""

from collections.abc import Callable, Iterable, Mapping
from itertools import chain, count
from typing import Any
from warnings import warn

import torch

# of all inputs, or of one by its name: the dimensions that may have any size, and their names
Dynamic = Mapping[int, str] | Callable[[str], Mapping[int, str]]


def axes_of(name: str, dynamic: Dynamic) -> Mapping[int, str]:
    """Return the free dimensions of an input, and their names."""
    return dynamic(name) if callable(dynamic) else dynamic


def check_free(program: torch.export.ExportedProgram, dynamic: Dynamic) -> None:
    """Refuse dimensions that the model's code fixes in all inputs; say in which others it does.

    Raises:
        ValueError: the first that no input has, or that is fixed.
    """
    inputs = program.graph_signature.user_inputs
    shapes = {n.name: n.meta["val"].shape for n in program.graph.nodes if n.name in inputs}
    axes = {x: axes_of(x, dynamic) for x in shapes}
    for axis, name in dict.fromkeys(pair for free in axes.values() for pair in free.items()):
        having = [x for x, shape in shapes.items() if axis in axes[x] and axis < len(shape)]
        sizes = {x: shapes[x][axis] for x in having}
        fixed = {x: size for x, size in sizes.items() if str(size).isdigit()}  # SymInt may be 3
        if not sizes:
            raise ValueError(f"dynamic names dimension {axis} ({name}), which no input has")
        said = ", ".join(f"{size} in {x}" for x, size in fixed.items())
        if len(fixed) == len(sizes):
            raise ValueError(f"dimension {axis} ({name}) is fixed by the model's code: {said}")
        if fixed:
            warn(
                f"dimension {axis} ({name}) is fixed by the model's code where it is {said}",
                stacklevel=4,
            )


def names_of(inputs: Iterable[Any], dynamic: Dynamic) -> dict[str, str]:
    """Return the names of the symbols that a trace gave to the free dimensions of a graph's inputs.

    A symbol is one size. Where the inputs' sizes on one axis may differ, the first has the name of
    the axis, and the others that of their input before it.

    Args:
        inputs: values of onnx_ir.
        dynamic: names by axis.
    """
    names: dict[str, str] = {}
    for value in inputs:
        for axis, name in axes_of(value.name, dynamic).items():
            symbol = str(value.shape[axis]) if axis < len(value.shape) else ""
            if symbol.isidentifier() and symbol not in names:
                longer = f"{value.name}_{name}"
                choices = chain((name, longer), (f"{longer}_{i}" for i in count(1)))
                names[symbol] = next(name for name in choices if name not in names.values())
    return names
