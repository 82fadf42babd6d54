"""The spread of values in groups of channels (Fig. 2 of the paper)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

GROUPS = 30


@dataclass(frozen=True)
class ChannelGroup:
    """Order statistics of the values of neighbouring channels, over all rows and tokens.

    The whiskers reach the last values within 1.5 interquartile ranges of the box (Tukey).
    """

    first: int  # channel
    last: int
    low: float
    whisker_low: float
    quartile_low: float
    median: float
    quartile_high: float
    whisker_high: float
    high: float


def channel_groups(values: Sequence[Tensor]) -> list[ChannelGroup]:
    """Split the channels, the last dimension of each tensor, into contiguous groups.

    Sizes differ by one at most: 768 channels make 18 groups of 26 and 12 of 25. Quartiles are
    linearly interpolated, as numpy's.
    """
    pooled = np.concatenate([x.detach().float().flatten(0, -2).cpu().numpy() for x in values])
    channels = np.arange(pooled.shape[1])
    parts = np.array_split(channels, min(GROUPS, len(channels)))
    return [_group(pooled[:, part], part) for part in parts]


def _group(values: np.ndarray, channels: np.ndarray) -> ChannelGroup:
    low, first, median, third, high = np.percentile(values, [0, 25, 50, 75, 100])
    reach = 1.5 * (third - first)
    whisker_low = values[values >= first - reach].min()
    whisker_high = values[values <= third + reach].max()
    numbers = low, whisker_low, first, median, third, whisker_high, high
    return ChannelGroup(int(channels[0]), int(channels[-1]), *map(float, numbers))
