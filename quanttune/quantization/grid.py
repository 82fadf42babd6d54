"""What the quantizers of activations and of weights share: a grid, and how it is rounded to."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..fake_quantizer import FakeQuant, grid_of
from .learning.lsq import LearnedFakeQuant, positive
from .learning.pact import ClippedFakeQuant
from .rounded_linear import Rounding


class KeepsFloat32(nn.Module):
    """A module whose numbers stay float32 when a model is moved to another type."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        return super()._apply(moved, recurse)


# how a scale may be learned: what rounds meanwhile
LEARNED: Mapping[str, Any] = MappingProxyType({"lsq": LearnedFakeQuant, "pact": ClippedFakeQuant})


class Grid(KeepsFloat32):
    """A grid of constant scale; or of one that is learned, as a factor of where it began.

    It lets everything pass while it is not `enabled`; its `round` rounds all the same.
    """

    enabled = True
    range_gradient = False  # of a grid that follows what it rounds: see `dynamic_fake_quant`
    bits: int
    scale: Tensor  # of a weight: None while it follows the weight
    factor: nn.Parameter | None
    learned_by: str | None = None  # how it is learned, by a name that learned_ranges.py has
    symmetric = True
    zero = 0  # the code of 0

    @property
    def step(self) -> Tensor:
        """The scale that is rounded with at present."""
        return self.scale if self.factor is None else positive(self.scale * self.factor.detach())

    def stop_learning(self) -> None:
        """Make the scale, if it was learned, a constant."""
        self.scale, self.factor, self.learned_by = self.step, None, None

    def _learn(self, scale: Tensor, how: str) -> nn.Parameter:
        self.scale, self.learned_by = scale, how
        self.factor = nn.Parameter(torch.ones_like(scale))
        return self.factor

    def _rounding(self, x: Tensor, axis: int | None = None) -> Rounding:
        """Return the function that rounds x, and what that takes beside it."""
        grid = grid_of(x, self.scale, self.bits, axis, zero_point=self.zero)
        if self.factor is None or self.learned_by is None:
            return FakeQuant, (self.scale, *grid)
        return LEARNED[self.learned_by], (self.scale * self.factor, *grid)

    def _round(self, x: Tensor, axis: int | None = None) -> Tensor:
        function, arguments = self._rounding(x, axis)
        return function.apply(x, *arguments)  # type: ignore[no-any-return]


def check_scale(site: str, scale: Tensor) -> None:
    """Refuse a scale that is not finite and positive."""
    if not (scale.isfinite() & (scale > 0)).all():
        raise ValueError(f"{site}.scale must be finite and positive")
