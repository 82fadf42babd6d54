"""AWQ: scale up the weights of channels that carry much, so that rounding harms them less."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..scheme import Scheme
from .equalizing.channel_factors import SMALLEST, ChannelEqualization, Channels
from .equalizing.pairs import Pair
from .equalizing.trial import Trial

STEPS = 20  # of the exponent


@dataclass(frozen=True)
class AWQ(ChannelEqualization):
    """Divide channel c by (mean |x_c|)^alpha, with the alpha that rounding costs least under.

    It is the one of 0, 0.05, ..., 0.95 whose rounded weights, and inputs where they are rounded,
    change the outputs of the Linear modules least, on 512 tokens of the calibration data; 0 changes
    nothing. The authors measure the whole of attention, or of the feed-forward part, and clip
    weights afterwards, which is ["awq", "weight_clipping"] here. Channels that no norm gives
    (inputs of o_proj and down_proj) stay as they are.

    Source: Lin et al., AWQ, arXiv 2306.00978, eq. 4 and 5.
    """

    name: ClassVar[str] = "awq"
    rows = 512

    def factors(self, pair: Pair, channels: Channels, scheme: Scheme) -> tuple[Tensor, Tensor]:
        energy = channels.rows.abs().mean(0).clamp_min(SMALLEST)
        trial = Trial(pair, channels.rows, scheme)
        scale = min((_centred(energy ** (i / STEPS)) for i in range(STEPS)), key=trial.error)
        return scale, torch.zeros_like(scale)


def _centred(scale: Tensor) -> Tensor:
    """Return factors whose smallest and largest one have the product 1."""
    low, high = torch.aminmax(scale)
    return scale / (low * high).sqrt()
