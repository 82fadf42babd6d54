"""SmoothQuant: share the range of a channel between activation and weight."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..scheme import Scheme
from .equalizing.channel_factors import SMALLEST, ChannelEqualization, Channels
from .equalizing.pairs import Input, Pair


@dataclass(frozen=True)
class SmoothQuant(ChannelEqualization):
    """Divide channel c by max|x_c|^alpha / max|W_c|^(1 - alpha), over all weights that read it.

    With alpha = 0.5 the largest value of a channel and that of its weights become equal.

    Args:
        alpha: from 0 (weights become even) to 1 (activations do). The authors take 0.5 for OPT,
            0.6 to 0.9 for the LLaMA family.

    Source: Xiao et al., SmoothQuant, arXiv 2211.10438.
    """

    name: ClassVar[str] = "smoothquant"
    alpha: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be from 0 to 1, got {self.alpha}")

    def factors(
        self, pair: Pair | Input, channels: Channels, scheme: Scheme
    ) -> tuple[Tensor, Tensor]:
        weights = torch.cat(pair.columns()).abs().amax(0).to(channels.absmax).clamp_min(SMALLEST)
        scale = channels.absmax**self.alpha / weights ** (1 - self.alpha)
        return scale.clamp_min(SMALLEST), torch.zeros_like(scale)
