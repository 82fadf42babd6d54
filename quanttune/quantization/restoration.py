"""Factors of channels that modules apply: what LayerNorms restore, and inputs that are smoothed."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .grid import KeepsFloat32
from .modules import QuantizedLinear, QuantizedTransposed

NAME = "restoration"  # of what a LayerNorm holds


class Restoration(KeepsFloat32):
    """What a LayerNorm was divided by, where it feeds more than Linear modules.

    The LayerNorm computes (x - shift) / scale, and that is what its quantizer rounds. The model
    gets x back; only `readers` take (x - shift) / scale again, which lies on the same grid.

    A Linear that holds one is its own and only reader: its input is divided by `scale`, alone.
    """

    scale: Tensor  # float32, (channels,)
    shift: Tensor

    def __init__(self, readers: Iterable[nn.Module], channels: int, device: torch.device) -> None:
        super().__init__()
        self.readers = list(readers)  # a list: these are no submodules
        self.handles: list[RemovableHandle] = []
        options = {"dtype": torch.float32, "device": device}
        self.register_buffer("scale", torch.ones(channels, **options))  # type: ignore[call-overload]
        self.register_buffer("shift", torch.zeros(channels, **options))  # type: ignore[call-overload]

    def restore(self, _: nn.Module, __: Any, x: Tensor) -> Tensor:
        """Return what the LayerNorm computed before; a forward hook of it."""
        # not +, which the functional sites look at
        return torch.addcmul(self.shift.to(x.dtype), x, self.scale.to(x.dtype))

    def equalize(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Undo `restore`; a forward pre-hook of the readers."""
        x, *others = args
        return ((x - self.shift.to(x.dtype)) / self.scale.to(x.dtype), *others)

    def smooth(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Divide an input; a forward pre-hook of a Linear. Runtimes multiply, which takes less."""
        x, *others = args
        wide = torch.promote_types(x.dtype, torch.float32)
        return (x * self.scale.to(wide).reciprocal().to(x.dtype), *others)


def add_restoration(norm: Any, readers: Iterable[nn.Module]) -> Restoration:
    """Restore the output of a LayerNorm for all but `readers`; it scales by 1 until told more."""
    restoration = Restoration(readers, norm.normalized_shape[-1], norm.weight.device)
    norm.add_module(NAME, restoration)
    restoration.handles.append(norm.register_forward_hook(restoration.restore))
    for reader in restoration.readers:
        handle = reader.register_forward_pre_hook(restoration.equalize)
        restoration.handles.append(handle)
    return restoration


def add_smoothing(module: Any, scale: Tensor) -> None:
    """Divide the input of a Linear or Conv1D by float32 factors, beside those it is divided by."""
    found: Any = getattr(module, NAME, None)
    if found is None:
        found = Restoration([module], len(scale), module.weight.device)
        module.add_module(NAME, found)
        found.handles.append(module.register_forward_pre_hook(found.smooth))
    found.scale = found.scale * scale


def drop_restorations(model: nn.Module) -> None:
    """Take all restorations out of a model; its parameters stay as they are."""
    for name, restoration in restorations(model).items():
        for handle in restoration.handles:
            handle.remove()
        delattr(model.get_submodule(name), NAME)


def restorations(model: nn.Module) -> dict[str, Restoration]:
    """Return the restorations of a model by the names of their LayerNorms."""
    found = {name: getattr(module, NAME, None) for name, module in model.named_modules()}
    return {name: module for name, module in found.items() if isinstance(module, Restoration)}


def described_restorations(model: nn.Module) -> dict[str, list[str]]:
    """Return the names of LayerNorms that have restorations, with those of their readers.

    A Linear whose input is smoothed is there with its own name.
    """
    names = {module: name for name, module in model.named_modules()}
    return {n: [names[m] for m in found.readers] for n, found in restorations(model).items()}


def add_described(model: nn.Module, described: Mapping[str, list[str]]) -> None:
    """Give a float model the restorations of another, whose factors are loaded later.

    Raises:
        ValueError: the model has no such LayerNorms and Linear modules.
    """
    modules: dict[str, Any] = dict(model.named_modules())
    counts = Counter(reader for readers in described.values() for reader in readers)
    if twice := [reader for reader, count in counts.items() if count > 1]:
        raise ValueError(f"restorations: {twice[0]!r} is listed more than once")
    for name, readers in described.items():
        norm = modules.get(name)
        if readers == [name] and isinstance(norm, (QuantizedLinear, QuantizedTransposed)):
            add_smoothing(norm, norm.weight.new_ones(_channels(norm), dtype=torch.float32))
            continue
        if not (isinstance(norm, nn.LayerNorm) and norm.elementwise_affine):
            raise ValueError(f"restorations: {name!r} is no LayerNorm with weights of this model")
        if unknown := [reader for reader in readers if reader not in modules]:
            raise ValueError(f"restorations: the model has no {unknown[0]}")
        channels = norm.normalized_shape[-1]
        for reader in readers:
            if not _multiplies(modules[reader], channels):
                raise ValueError(
                    f"restorations: {reader!r} is no Linear or Conv1D of {channels} inputs"
                )
        add_restoration(norm, [modules[reader] for reader in readers])


def _multiplies(module: Any, channels: int) -> bool:
    """Tell whether a module is quantized, and multiplies this many channels with a weight."""
    if not isinstance(module, (QuantizedLinear, QuantizedTransposed)):
        return False
    return _channels(module) == channels


def _channels(module: Any) -> int:
    return int(module.weight.shape[1 - module.output_axis])
