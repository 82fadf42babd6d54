"""What a calibrator is, and those that follow the lowest and highest value of each batch."""

import math
from abc import ABC, abstractmethod
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor


class Range(NamedTuple):
    """What a grid covers. Float32, each of shape ()."""

    low: Tensor
    high: Tensor

    def with_zero(self) -> "Range":
        """Return the range that reaches to zero as well, which is on every grid."""
        return Range(self.low.clamp(max=0), self.high.clamp(min=0))


class Calibrator(Protocol):
    """What chooses the range of one site. It sees each batch once."""

    def update(self, x: Tensor) -> None:
        """See one batch of a site; an empty one says nothing."""

    def absmax(self) -> Tensor:
        """Return the largest magnitude that a symmetric grid covers: float32, of shape ().

        NaN or inf if the data held one.

        Raises:
            ValueError: nothing was seen.
        """


@runtime_checkable
class AffineCalibrator(Calibrator, Protocol):
    """A calibrator that an affine grid can take its range from."""

    def range(self) -> Range:
        """Return both ends; NaN or inf if the data held one."""


class RangeCalibrator(ABC):
    """A calibrator that knows both ends: a symmetric grid covers the larger, an affine one both."""

    _range: Range | None = None

    def update(self, x: Tensor) -> None:
        if x.numel():
            self._range = self._next(x.detach())

    @abstractmethod
    def _next(self, x: Tensor) -> Range:
        """Return the range after one more batch."""

    def range(self) -> Range:
        """Return both ends of what an affine grid covers."""
        return seen(self._range)

    def absmax(self) -> Tensor:
        low, high = self.range()
        return torch.maximum(-low, high)


def seen(value: Range | None) -> Range:
    """Return what was found out, if a batch was seen."""
    if value is None:
        raise ValueError(
            "the calibrator has seen no data: update it with a batch that is not empty"
        )
    return value


def extremes(x: Tensor) -> Range:
    """Return the lowest and the highest value of x."""
    return Range(*(value.float() for value in torch.aminmax(x)))


class MinMax(RangeCalibrator):
    """Cover everything that was seen."""

    def _next(self, x: Tensor) -> Range:
        low, high = extremes(x)
        if self._range is None:
            return Range(low, high)
        return Range(torch.minimum(self._range.low, low), torch.maximum(self._range.high, high))


class AveragedCalibrator(RangeCalibrator):
    """Cover the moving average of each batch's range, or (sigma=None) the plain one.

    With sigma, the first batch counts in full: of ten, at sigma = 0.01, with a weight of 0.91. The
    order of the batches matters.
    """

    def __init__(self, sigma: float | None) -> None:
        if sigma is not None and not 0 < sigma <= 1:
            raise ValueError(f"sigma must be above 0 and at most 1, got {sigma}")
        self.sigma = sigma
        self._batches = 0

    @abstractmethod
    def _of_batch(self, x: Tensor) -> Range:
        """Return the range of one batch."""

    def _next(self, x: Tensor) -> Range:
        self._batches += 1
        new = self._of_batch(x)
        if self._range is None:
            return new
        share = 1 / self._batches if self.sigma is None else self.sigma
        low, high = self._range
        return Range(low + share * (new.low - low), high + share * (new.high - high))


class MovingAverage(AveragedCalibrator):
    """Cover the exponential moving average of each batch's lowest and highest value.

    sigma = 0.01 is FQ-ViT's, 0.1 the momentum of 0.9 elsewhere.
    """

    def __init__(self, sigma: float = 0.01) -> None:
        super().__init__(sigma)

    def _of_batch(self, x: Tensor) -> Range:
        return extremes(x)


class SearchCalibrator(ABC):
    """A calibrator that adds up what each range would lose, over all batches.

    Its ranges end within what was seen. Zeros lose nothing, and what is not finite has no range.
    """

    def __init__(self) -> None:
        self._minmax = MinMax()
        self._is_empty = True

    def update(self, x: Tensor) -> None:
        self._minmax.update(x)
        absmax = self._minmax.absmax().item() if x.numel() else 0.0
        if absmax != 0 and math.isfinite(absmax):
            self._extend(absmax)
            self._add(x.detach())
            self._is_empty = False

    def absmax(self) -> Tensor:
        absmax = self._minmax.absmax()
        if self._is_empty or not absmax.isfinite():
            return absmax
        return torch.minimum(self._best().to(absmax.device), absmax)

    @abstractmethod
    def _extend(self, absmax: float) -> None:
        """Let the ranges reach up to `absmax`, the largest magnitude so far."""

    @abstractmethod
    def _add(self, x: Tensor) -> None:
        """Add one more batch."""

    @abstractmethod
    def _best(self) -> Tensor:
        """Return the end of the range that loses the least."""
