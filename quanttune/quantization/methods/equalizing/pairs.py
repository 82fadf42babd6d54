"""What can be changed together: a norm and the Linear modules that read it, or one's input."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...modules import QuantizedModule, quantized_class_of
from ...restoration import NAME, add_restoration, add_smoothing
from .norms import Norm


@dataclass(frozen=True, eq=False)
class Pair:
    """A norm and the Linear or Conv1D modules that read its output, and nothing else.

    alone: nothing but they reads it, so that what they take can be changed at once.
    """

    verb: ClassVar[str] = "returned"  # what an error tells of the name
    name: str
    norm: Norm
    readers: dict[str, nn.Module]
    alone: bool

    @property
    def shifts(self) -> bool:
        """Whether there are biases to fold a shift of the channels into."""
        readers: Iterable[Any] = self.readers.values()
        return self.norm.bias is not None and all(m.bias is not None for m in readers)

    def columns(self) -> list[Tensor]:
        """Return the readers' weights as (outputs, channels), which are views."""
        return [columns_of(module) for module in self.readers.values()]

    @torch.no_grad()
    def fold(self, scale: Tensor, shift: Tensor) -> None:
        """Let the norm compute (x - shift) / scale, and its readers what they did, in place.

        Args:
            scale, shift: of shape (channels,); shift is zero unless it `shifts`.
        """
        norm = self.norm.module
        # both sides must know the same factors, in a model of half precision too
        scale, shift = (x.float().to(norm.weight.dtype) for x in (scale, shift))
        if self.norm.offset:
            scale = _divide_offset(norm.weight, scale, self.norm.offset)
        else:
            norm.weight.div_(scale)
        if self.norm.bias is not None:
            norm.bias.sub_(shift).div_(scale)
        readers: Iterable[Any] = self.readers.values()
        for module, columns in zip(readers, self.columns(), strict=True):
            if module.bias is not None:
                module.bias.add_(columns @ shift)
            columns.mul_(scale)
        if not self.alone:
            self._restore(scale.float(), shift.float())

    def _restore(self, scale: Tensor, shift: Tensor) -> None:
        norm = self.norm.module
        found: Any = getattr(norm, NAME, None)
        found = found or add_restoration(norm, self.readers.values())
        found.shift = found.shift + shift * found.scale
        found.scale = found.scale * scale


@dataclass(frozen=True, eq=False)
class Input:
    """What a Linear or Conv1D reads, and no norm gave: its factors are multiplied with."""

    verb: ClassVar[str] = "got"
    name: str
    module: Any

    @property
    def readers(self) -> dict[str, nn.Module]:
        return {self.name: self.module}

    def columns(self) -> list[Tensor]:
        """Return the weight as (outputs, channels), which is a view."""
        return [columns_of(self.module)]

    @torch.no_grad()
    def fold(self, scale: Tensor, _: Tensor) -> None:
        """Divide the input by `scale`, (channels,), and let the module compute what it did."""
        # both sides must know the same factors, in a model of half precision too
        scale = scale.float().to(self.module.weight.dtype)
        columns_of(self.module).mul_(scale)
        add_smoothing(self.module, scale.float())


def _divide_offset(weight: Tensor, scale: Tensor, offset: float) -> Tensor:
    """Divide the gain, offset + weight, in place; return by what, as the weight's type holds it."""
    before = weight.double() + offset
    rounded = (before / scale.double() - offset).to(weight.dtype)
    after = rounded.double() + offset
    fits = (after != 0) & (before != 0)  # near -1 half precision is coarse
    weight.copy_(torch.where(fits, rounded, weight))
    return torch.where(fits, before / after, 1).to(torch.promote_types(weight.dtype, torch.float32))


def columns_of(module: Any) -> Tensor:
    """Return the weight of a Linear or Conv1D as (outputs, inputs), a view."""
    holder = module if isinstance(module, QuantizedModule) else quantized_class_of(module)
    return module.weight.movedim(holder.output_axis, 0)  # type: ignore[no-any-return]
