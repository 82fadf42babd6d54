"""The range whose grid keeps the most of the distribution of magnitudes."""

import math

import torch
from torch import Tensor

from ... import ops
from ...fake_quantizer import integer_range
from .ranges import SearchCalibrator

BINS = 2048  # of the first batch
MOST_BINS = 8 * BINS
ROUNDING = 1e-9  # nats: far above that of the running sums, far below what tells ranges apart


class Entropy(SearchCalibrator):
    """Cover the range whose clipped, coarser histogram of magnitudes diverges the least.

    The rule of TensorRT: of all ranges that end at a bin's edge, that of the smallest KL divergence
    between the histogram up to there, what lies beyond counted in its last bin, and the same merged
    into 2^(bits - 1) levels. Zeros do not count: the first bin gets what the second has. The first
    batch fixes the width of the bins, and later ones add bins; above 16,384 two at a time are
    merged, which TensorRT does not do.
    """

    def __init__(self, bits: int = 8) -> None:
        super().__init__()
        self.levels = integer_range(bits)[1] + 1
        if self.levels > BINS:
            raise ValueError(f"kl searches grids of at most 12 bits, got {bits}")
        self._width = 0.0
        self._counts = torch.zeros(BINS, dtype=torch.int64)

    def _add(self, x: Tensor) -> None:
        counts = ops.magnitude_histogram(x, self._width, len(self._counts))
        self._counts += counts.to(self._counts.device)

    def _best(self) -> Tensor:
        divergence = divergences(self._counts, self.levels)
        # of equal ones, the widest: tensors of few values, such as images, have many
        last = int((divergence <= divergence.min() + ROUNDING).nonzero()[-1])
        return torch.tensor((self.levels + last) * self._width, dtype=torch.float32)

    def _extend(self, absmax: float) -> None:
        self._width = self._width or absmax / BINS
        while absmax > MOST_BINS * self._width:
            self._counts = torch.nn.functional.pad(self._counts, (0, len(self._counts) % 2))
            self._counts = self._counts.view(-1, 2).sum(1)
            self._width *= 2
        missing = math.ceil(absmax / self._width) - len(self._counts)
        self._counts = torch.nn.functional.pad(self._counts, (0, max(missing, 0)))


def divergences(counts: Tensor, levels: int) -> Tensor:
    """Return the KL divergence of the ranges of `levels` bins, one bin more, ... and all bins.

    Of the range of i bins, bin b belongs to level floor(b * levels / i), and a level's mass is
    spread evenly over those of its bins that are not empty. Sums over bins are differences of
    running sums, so that a range costs as much as it has levels.
    """
    mass = counts.double()
    mass[0] = mass[1]
    ends = torch.arange(levels, len(mass) + 1)
    level = torch.arange(levels + 1)
    edges = -(-level * ends[:, None] // levels)  # (ranges, levels + 1), rounded up
    below, filled, entropy = _running(mass), _running(mass > 0), _running(torch.xlogy(mass, mass))

    of_level = below[edges].diff()
    spread = of_level / filled[edges].diff().clamp(min=1)
    last, tail = mass[ends - 1], below[-1] - below[ends]
    clipped = last + tail
    reference = entropy[ends] - torch.xlogy(last, last) + torch.xlogy(clipped, clipped)
    crossed = torch.xlogy(of_level, spread).sum(1) + torch.xlogy(tail, spread[:, -1])
    result = (reference - crossed) / below[-1] - (below[-1] / below[ends]).log()
    # nothing stands for what was clipped
    return torch.where((last == 0) & (tail > 0), torch.inf, result)


def _running(values: Tensor) -> Tensor:
    """Return the sums of the first 0, 1, ... values, in float64."""
    return torch.nn.functional.pad(values.double().cumsum(0), (1, 0))
