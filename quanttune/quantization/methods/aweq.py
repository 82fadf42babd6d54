"""AWEQ: equalize the ranges of activations and weights."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..scheme import Scheme
from .equalizing.channel_factors import SMALLEST, ChannelEqualization, Channels
from .equalizing.pairs import Pair


@dataclass(frozen=True)
class AWEQ(ChannelEqualization):
    """Divide channel c by sqrt(range of x_c / range of W_c), over all weights that read it.

    A range is the highest value less the lowest. The authors correct biases afterwards, which is
    ["aweq", "bias_correction"] here.

    Source: Li et al., AWEQ, arXiv 2311.01305.
    """

    name: ClassVar[str] = "aweq"

    def factors(self, pair: Pair, channels: Channels, scheme: Scheme) -> tuple[Tensor, Tensor]:
        low, high = torch.aminmax(torch.cat(pair.columns()).to(channels.low), dim=0)
        weights = (high - low).clamp_min(SMALLEST)
        scale = ((channels.high - channels.low) / weights).sqrt()
        return scale.clamp_min(SMALLEST), torch.zeros_like(scale)
