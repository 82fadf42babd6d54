"""What `quanttune.fused_observer` offers, on autograd alone."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .outlier_statistics import (
    DEVIATION,
    MEDIAN,
    MEDIAN_COUNT,
    RATIO,
    outlier_statistics,
    sample_positions,
)


class Statistics(NamedTuple):
    """The outlier statistics of every sample, each of shape (samples,). Only `ratio` has a
    gradient.
    """

    maximum: Tensor  # max|A|
    median: Tensor  # lower median of |A|
    mean: Tensor  # of the signed A
    deviation: Tensor  # of the signed A, with N - 1
    ratio: Tensor  # (maximum - median) / deviation, one term of eq. 2


def rows_of(x: Tensor, samples: int | None) -> int:
    """Check that x holds `samples` rows (its first dimension if None), and return their number."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = f"a tensor of {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x must be a floating-point tensor, got {got}")
    if samples is None:
        if x.dim() == 0:
            raise ValueError("x has no dimension to take the samples from: give samples=1")
        samples = x.shape[0]
    if samples < 0 or (samples == 0) != (x.numel() == 0) or (samples and x.numel() % samples):
        raise ValueError(f"{samples} samples do not divide x of shape {tuple(x.shape)}")
    return samples


def observe(
    x: Tensor,
    samples: int | None = None,
    *,
    exact: bool = False,
    detach_deviation: bool = False,
) -> tuple[Tensor, Statistics]:
    """Return x and the outlier statistics of each sample, on plain autograd."""
    samples = rows_of(x, samples)
    constants = outlier_statistics(x.detach(), samples, exact)
    if samples == 0:
        return x, Statistics._make(constants[:, : RATIO + 1].unbind(1))
    rows = x.reshape(samples, -1).to(constants.dtype)
    magnitude = rows.abs()
    sampled = magnitude if exact else magnitude[:, sample_positions(rows.shape[1], x.device)]
    at_median = sampled.detach() == constants[:, MEDIAN, None]
    # ties share the gradient, as they do in amax
    median = torch.where(at_median, sampled, 0).sum(1) / constants[:, MEDIAN_COUNT]
    deviation = constants[:, DEVIATION] if detach_deviation else _standard_deviation(rows)
    constant = constants[:, DEVIATION] == 0
    ratio = (magnitude.amax(1) - median) / torch.where(constant, 1, deviation)
    ratio = torch.where(constant, 0, ratio)
    return x, Statistics._make((*constants[:, :RATIO].unbind(1), ratio))


def _standard_deviation(rows: Tensor) -> Tensor:
    centred = rows - rows.mean(1, keepdim=True)
    variance = centred.square().sum(1) / max(rows.shape[1] - 1, 1)
    # the root of zero has no gradient; where the variance is zero the ratio is replaced anyway
    return torch.where(variance == 0, 1, variance).sqrt()


def outlier_ratio(
    x: Tensor,
    samples: int | None = None,
    *,
    exact: bool = False,
    detach_deviation: bool = False,
) -> Tensor:
    """Return (max|A| - median|A|) / deviation(A) of each sample, a term of eq. 2."""
    return observe(x, samples, exact=exact, detach_deviation=detach_deviation)[1].ratio


class FusedObserver(nn.Module):
    """Pass x through and keep the ratio of each of its samples in `ratio`, on plain autograd.

    `ratio` is None after a forward in evaluation mode or under no_grad, which observes nothing;
    reentrant checkpoints run their first forward like that.
    """

    _observe = staticmethod(observe)

    def __init__(self, *, exact: bool = False, detach_deviation: bool = False) -> None:
        super().__init__()
        self.exact, self.detach_deviation = exact, detach_deviation
        self.ratio: Tensor | None = None

    def forward(self, x: Tensor, samples: int | None = None) -> Tensor:
        self.ratio = None
        if not (self.training and torch.is_grad_enabled()):
            return x
        options = {"exact": self.exact, "detach_deviation": self.detach_deviation}
        x, statistics = self._observe(x, samples, **options)
        self.ratio = statistics.ratio
        return x

    def extra_repr(self) -> str:
        return f"exact={self.exact}, detach_deviation={self.detach_deviation}"
