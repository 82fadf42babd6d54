"""Modules that multiply with parameters of their own: rounded for as long as their forward runs."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from torch import Tensor, nn

from .modules import Made, joined
from .multihead_attention import PROJECTIONS, QuantizedMultiheadAttention
from .quantizer import WeightQuantizer
from .row_quantizers import StackQuantizer
from .scheme import Scheme

# experts that multiply with (inputs, outputs), and have no `is_transposed` to tell
_TRANSPOSED = {"Llama4TextExperts"}


class Parameter:
    """A parameter that a module rounds, in the form of a quantized module of one weight."""

    output_axis = 0  # of the rows that have scales

    def __init__(self, module: Any, name: str) -> None:
        self.module, self.name = module, name

    @property
    def weight(self) -> nn.Parameter:
        return self.module._parameters[self.name]  # type: ignore[no-any-return]

    @property
    def weight_quantizer(self) -> Any:
        return getattr(self.module, f"{self.name}_quantizer")

    @weight_quantizer.setter
    def weight_quantizer(self, quantizer: nn.Module) -> None:
        setattr(self.module, f"{self.name}_quantizer", quantizer)


class RoundsParameters:
    """A module that rounds `rounded` in its forward; elsewhere they are read as they are."""

    rounded: tuple[str, ...]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with _rounding(self):  # type: ignore[arg-type]
            return super().forward(*args, **kwargs)  # type: ignore[misc]


class _Here(threading.local):
    """The rounded parameters of the forwards under way in this thread, by the id of the module."""

    def __init__(self) -> None:
        self.rounded: dict[int, dict[str, Tensor]] = {}


_here = _Here()


@contextmanager
def _rounding(module: Any) -> Iterator[None]:
    """Let a module, in this thread, read rounded parameters: once each, however often it reads."""
    before = _here.rounded.get(id(module))
    _here.rounded[id(module)] = {
        name: getattr(module, f"{name}_quantizer")(module._parameters[name])
        for name in module.rounded
    }
    try:
        yield
    finally:
        if before is None:
            del _here.rounded[id(module)]
        else:
            _here.rounded[id(module)] = before


def _reader(name: str) -> property:
    def read(module: Any) -> Any:
        rounded = _here.rounded.get(id(module))
        return module._parameters[name] if rounded is None else rounded[name]

    return property(read)


@cache
def rounding(*names: str) -> type:
    """Return the class of modules that round these parameters."""
    readers = {name: _reader(name) for name in names}
    members = {"rounded": names, "made_by": (rounding, names), **readers}
    return Made("RoundsParameters", (RoundsParameters,), members)


def rounding_class_of(module: nn.Module) -> Any:
    """Return the class of a module that rounds its parameters, or None if it has none to round."""
    own: Any = type(module)
    if names := tuple(stacks_of(module)):
        return joined(rounding(*names), own)
    if own.forward is not nn.MultiheadAttention.forward:
        return None
    quantized: Any = QuantizedMultiheadAttention
    quantized = quantized if own is nn.MultiheadAttention else joined(quantized, own)
    names = tuple(name for name in PROJECTIONS if module._parameters.get(name) is not None)
    return joined(rounding(*names), quantized)


def parameter_quantizer(module: nn.Module, name: str, scheme: Scheme, site: str) -> nn.Module:
    """Make what a parameter of such a module goes through."""
    quantizer = scheme.weight_quantizer(site, 0)
    outputs = stacks_of(module).get(name)
    if outputs is None or not isinstance(quantizer, WeightQuantizer):
        return quantizer
    stack = StackQuantizer(quantizer.bits, quantizer.axis, outputs)
    stack.range_gradient = quantizer.range_gradient
    return stack


def stacks_of(module: nn.Module) -> dict[str, int]:
    """Return the parameters of a module of experts, a matrix each, and the dimension of outputs."""
    found = {n: p for n, p in module._parameters.items() if p is not None and p.dim() == 3}
    counts = {value for name, value in vars(module).items() if "expert" in name}
    counts |= {len(p) for p in found.values() if "Expert" in type(module).__name__}
    return {
        name: _outputs(module)
        for name, p in found.items()
        if len(p) in counts and p.is_floating_point()
    }


def _outputs(module: Any) -> int:
    """Return which dimension of a stack has the outputs: as in Linear unless the module says."""
    names = {one.__name__ for one in type(module).__mro__}
    transposed = getattr(module, "is_transposed", bool(names & _TRANSPOSED))
    return 2 if transposed else 1
