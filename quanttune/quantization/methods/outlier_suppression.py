"""Outlier Suppression+: shift channels to zero, and scale down those beyond a threshold."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...fake_quantizer import dynamic_fake_quant
from ..scheme import Scheme
from .equalizing.channel_factors import ChannelEqualization, Channels
from .equalizing.pairs import Pair


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
        trial = _Trial(pair, channels.rows - shift, absmax, scheme)
        threshold = min(_thresholds(absmax.max().item()), key=trial.error)
        return (absmax / threshold).clamp_min(1), shift


def _thresholds(largest: float) -> list[float]:
    if largest <= 1:
        return [1.0]
    return torch.linspace(largest, 1, max(100, math.ceil(2 * largest)) + 1).tolist()


class _Trial:
    """What thresholds cost on the tokens of one pair, on min-max grids."""

    def __init__(self, pair: Pair, rows: Tensor, absmax: Tensor, scheme: Scheme) -> None:
        self._rows, self._absmax = rows, absmax
        self._readers = [
            (columns.to(rows), rows @ columns.to(rows).T, *_roundings(name, scheme, rows))
            for name, columns in zip(pair.readers, pair.columns(), strict=True)
        ]

    def error(self, threshold: float) -> float:
        scale = (self._absmax / threshold).clamp_min(1)
        rows = self._rows / scale
        return sum(
            float((round_input(rows) @ round_weight(columns * scale).T - wanted).square().sum())
            for columns, wanted, round_input, round_weight in self._readers
        )


def _roundings(name: str, scheme: Scheme, rows: Tensor) -> tuple[Any, nn.Module]:
    """Return how a module's input and its weight, as (outputs, inputs), will be rounded."""
    quantizer = scheme.activation_quantizer(f"{name}.input_quantizer", "input", rows.device)
    bits = getattr(quantizer, "bits", None)  # None where an override leaves it in float
    round_input = nn.Identity() if bits is None else partial(dynamic_fake_quant, bits=bits)
    return round_input, scheme.weight_quantizer(f"{name}.weight_quantizer", 0, rows.shape[1])
