"""Outlier Suppression+: shift channels to zero, and scale down those beyond a threshold."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..scheme import Scheme
from .equalizing.channel_factors import ChannelEqualization, Channels
from .equalizing.pairs import Pair
from .equalizing.trial import Trial


@dataclass(frozen=True)
class OutlierSuppression(ChannelEqualization):
    """Subtract (max + min) / 2 from a channel, and divide by max(1, max|x_c| / t) what is left.

    Where a reader has no bias, nothing is subtracted. The threshold t is the one of 100 or more,
    evenly from the largest value down to 1, whose rounded weights and activations change the
    outputs of the Linear modules least (the authors take that of attention for q, k and v), on 512
    tokens of the calibration data.

    Source: Wei et al., Outlier Suppression+, arXiv 2304.09145.
    """

    name: ClassVar[str] = "outlier_suppression"
    rows = 512

    def factors(self, pair: Pair, channels: Channels, scheme: Scheme) -> tuple[Tensor, Tensor]:
        low, high = channels.low, channels.high
        shift = (high + low) / 2 if pair.shifts else torch.zeros_like(low)
        absmax = torch.maximum(high - shift, shift - low)
        trial = Trial(pair, channels.rows - shift, scheme)
        scales = ((absmax / t).clamp_min(1) for t in _thresholds(absmax.max().item()))
        return min(scales, key=trial.error), shift


def _thresholds(largest: float) -> list[float]:
    if largest <= 1:
        return [1.0]
    return torch.linspace(largest, 1, max(100, math.ceil(2 * largest)) + 1).tolist()
