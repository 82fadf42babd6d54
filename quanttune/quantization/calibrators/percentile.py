"""Percentiles of each batch, exact on tensors of any size."""

import math

import numpy as np
import torch
from torch import Tensor

from .ranges import AveragedCalibrator, Range

GROUP = 64  # elements of which the largest is looked at first


class Percentile(AveragedCalibrator):
    """Cover `percent` of the magnitudes of each batch, on average over the batches.

    Linear interpolation between the two neighbouring values, like numpy.percentile. The default
    beats min-max on an untuned MiniLM (docs/results.md). FQ-ViT takes 99.999, two-sided, with
    sigma = 0.01.

    Args:
        percent: above 0 and at most 100.
        two_sided: cover from the (100 - percent)-th to the percent-th percentile of the values.
        sigma: of the exponential moving average over the batches; None is the plain average.
    """

    def __init__(
        self, percent: float = 99.9, *, two_sided: bool = False, sigma: float | None = None
    ) -> None:
        if not 0 < percent <= 100:
            raise ValueError(f"percent must be above 0 and at most 100, got {percent}")
        super().__init__(sigma)
        self.percent, self.two_sided = percent, two_sided

    def _of_batch(self, x: Tensor) -> Range:
        values = x.flatten()
        if self.two_sided:
            return Range(-percentile(-values, self.percent), percentile(values, self.percent))
        magnitude = percentile(values.abs(), self.percent)
        return Range(-magnitude, magnitude)


def percentile(values: Tensor, percent: float) -> Tensor:
    """Return a percentile of a vector in float32; of one that holds NaN or inf, its maximum.

    torch.quantile refuses more than 2^24 elements, and sorts.
    """
    rank = (len(values) - 1) * percent / 100
    below = math.floor(rank)
    largest = _largest(values, len(values) - below).float()
    low = largest[0]
    high = largest[1:].min() if rank > below else low
    value = low + (rank - below) * (high - low)
    return torch.where(largest.isfinite().all(), value, largest.max())


def _largest(values: Tensor, count: int) -> Tensor:
    """Return the `count` largest values, the smallest of them first; NaN is above all."""
    groups = len(values) // GROUP
    # the largest values lie in the groups with the largest maxima: few have to be looked at closely
    if 2 * count < groups:
        grouped = values[: groups * GROUP].view(groups, GROUP)
        chosen = grouped.amax(1).topk(count, sorted=False).indices
        values = torch.cat([grouped[chosen].flatten(), values[groups * GROUP :]])
    if values.device.type == "cpu":  # where torch selects slowly
        first = len(values) - count
        return torch.from_numpy(np.partition(values.float().numpy(), first)[first:])
    return values.topk(count).values.flip(0)
