"""How much of a tensor's distribution a grid keeps (the bars of Fig. 4 of the paper)."""

import torch
from torch import Tensor

from .error_split import Quantize

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
