"""How much of a site's error is saturation, and how much is lost precision (Fig. 3 of the paper).

With [low, high] what the grid represents and c = clip(x, low, high), the error x - Q(x) is
(x - c) + (c - Q(x)). A value that saturates lands on the grid, so one of the two is always zero:
sums of squares add exactly.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Quantize = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ErrorSplit:
    """Sums of squared errors over the elements."""

    elements: int = 0
    saturation: float = 0.0
    precision: float = 0.0

    def __add__(self, other: "ErrorSplit") -> "ErrorSplit":
        sums = zip(vars(self).values(), vars(other).values(), strict=True)
        return ErrorSplit(*(a + b for a, b in sums))

    @property
    def total(self) -> float:
        return self.saturation + self.precision

    @property
    def precision_share(self) -> float:
        """Precision loss as a share of the squared error; 1 where there is no error."""
        return self.precision / self.total if self.total else 1.0


def split_error(x: Tensor, quantize: Quantize) -> ErrorSplit:
    """Split the error of `quantize(x)`; it may be any uniform grid that saturates.

    Source: QuantTune, arXiv 2403.06497, section 3; squares are our choice.
    """
    x = x.float()
    low, high = quantize(x.new_tensor([-torch.inf, torch.inf])).tolist()
    clipped = x.clamp(low, high)
    # in the memory of the errors; torch adds float32 in pairs, which loses about 1e-7 of the sum
    saturation = (x - clipped).square_().sum().item()
    precision = clipped.sub_(quantize(x)).square_().sum().item()
    return ErrorSplit(x.numel(), saturation, precision)


BINS = 2048


def histogram(x: Tensor, low: float, high: float) -> Tensor:
    """Count x in equal bins from `low` to `high`, of shape (BINS,), in float64."""
    if low == high:  # torch.histc would widen the range
        return torch.tensor([float(x.numel())] + [0.0] * (BINS - 1), dtype=torch.float64)
    return torch.histc(x.detach().float(), BINS, low, high).double().cpu()


def divergence(
    counts: Tensor, low: float, high: float, quantize: Quantize, device: torch.device | None = None
) -> float:
    """Return KL(P || Q) in nats: what a tensor loses, by its histogram over [low, high].

    P is the histogram. Q spreads the mass of each level of the grid evenly over those bins of the
    level that are not empty, as TensorRT's calibration does, so it is finite, and 0 for a grid with
    a level for each bin. Clipped values belong to the outermost levels.

    device: where `quantize` computes; by default the CPU.
    """
    width = (high - low) / BINS
    filled = counts > 0
    centers = low + width * (torch.arange(BINS, dtype=torch.float64)[filled] + 0.5)
    p = counts[filled] / counts.sum()
    levels = quantize(centers.to(device, torch.float32)).cpu()
    _, level, size = levels.unique(return_inverse=True, return_counts=True)
    mass = torch.zeros(len(size), dtype=torch.float64).index_add_(0, level, p)
    return max(0.0, (p * (p * size[level] / mass[level]).log()).sum().item())
