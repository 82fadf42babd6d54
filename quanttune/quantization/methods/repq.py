"""RepQ-ViT's reparameterization, in symmetric form: one scale per tensor instead of per channel."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..scheme import Scheme
from .equalizing.channel_factors import SMALLEST, ChannelEqualization, Channels
from .equalizing.pairs import Pair


@dataclass(frozen=True)
class RepQ(ChannelEqualization):
    """Divide channel c by max|x_c| / mean over c of max|x_c|.

    One scale for the tensor then gives the codes that one scale per channel would have given.
    Weights take all of the imbalance.

    Source: Li et al., RepQ-ViT, arXiv 2212.08254, without zero points.
    """

    name: ClassVar[str] = "repq"

    def factors(self, pair: Pair, channels: Channels, scheme: Scheme) -> tuple[Tensor, Tensor]:
        absmax = channels.absmax
        scale = (absmax / absmax.mean().clamp_min(SMALLEST)).clamp_min(SMALLEST)
        return scale, torch.zeros_like(scale)
