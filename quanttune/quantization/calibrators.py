"""From the activations of a site, batch by batch, to the range that its grid covers.

A calibrator is a class with `update(x)` and `absmax()`; a new one is a class in the table.
"""

import math
from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..reference import absmax


class Calibrator(Protocol):
    def update(self, x: Tensor) -> None:
        """See one batch of a site."""

    def absmax(self) -> Tensor:
        """Return the largest magnitude that the grid represents, of shape ()."""


class MinMax:
    """Cover everything that was seen."""

    def __init__(self) -> None:
        self._absmax: Tensor | None = None

    def update(self, x: Tensor) -> None:
        seen = absmax(x).float()
        self._absmax = seen if self._absmax is None else torch.maximum(self._absmax, seen)

    def absmax(self) -> Tensor:
        assert self._absmax is not None
        return self._absmax


class Percentile:
    """Cover `percent` of the magnitudes of each batch, on average over the batches.

    Linear interpolation between the two neighbouring values, like numpy.percentile. The default
    beats min-max on an untuned MiniLM (docs/results.md); FQ-ViT takes 99.999.
    """

    def __init__(self, percent: float = 99.9) -> None:
        if not 0 < percent <= 100:
            raise ValueError(f"percent must be above 0 and at most 100, got {percent}")
        self.percent = percent
        self._sum, self._batches = torch.zeros(()), 0

    def update(self, x: Tensor) -> None:
        magnitude = x.detach().abs().flatten().float()
        rank = (magnitude.numel() - 1) * self.percent / 100
        below = math.floor(rank)
        # torch.quantile refuses more than 2^24 elements, and on CPU torch selects slowly
        if x.device.type == "cpu":
            largest = torch.from_numpy(np.partition(magnitude.numpy(), below)[below:])
        else:
            largest = magnitude.topk(magnitude.numel() - below).values.flip(0)
        low = largest[0]
        high = largest[1:].min() if rank > below else low
        value = low + (rank - below) * (high - low)
        value = torch.where(largest.isfinite().all(), value, largest.max())
        self._sum, self._batches = self._sum.to(x.device) + value, self._batches + 1

    def absmax(self) -> Tensor:
        return self._sum / self._batches


CALIBRATORS: dict[str, Callable[[], Calibrator]] = {"minmax": MinMax, "percentile": Percentile}
