"""Ranges that lose the least: candidates are tried on the data, all of them in one read."""

import torch
from torch import Tensor

from ... import ops
from ...fake_quantizer import integer_range, scale_of
from .ranges import MinMax, Range, RangeCalibrator, SearchCalibrator

CANDIDATES = 100  # of "mse"


class SymmetricOMSE(RangeCalibrator):
    """Cover the part of min-max, from 100 % down to 11 % in steps of 1 %, that loses the least.

    The range is that of all batches, the loss is the squared error on the last batch alone: the
    rule of FQ-ViT, on a symmetric grid. Each batch is searched as if it were the last, so that none
    has to be kept. Of equal losses the larger range wins.
    """

    def __init__(self, bits: int = 8) -> None:
        self.bits = bits
        self.qmin, self.qmax = integer_range(bits)
        self._minmax = MinMax()

    def _next(self, x: Tensor) -> Range:
        self._minmax.update(x)
        candidates = self._minmax.absmax() * _shrinking(x.device)
        errors = ops.quantization_errors(x, scale_of(candidates, self.bits), self.qmin, self.qmax)
        best = candidates[errors.argmin()]
        return Range(-best, best)


class AffineOMSE(SymmetricOMSE):
    """The same on a grid with a zero point, as FQ-ViT has it for any type.

    `affine_qparams` tells the grid of the range that is found. Zero is always inside of it, which
    FQ-ViT does not ask for: its grid of values from 5 to 10 ends at 5.
    """

    def _next(self, x: Tensor) -> Range:
        self._minmax.update(x)
        low, high = covered = self._minmax.range().with_zero()
        scale, zero_point = affine_qparams(covered, self.bits)
        factors = _shrinking(x.device)
        zero = int(zero_point)
        errors = ops.quantization_errors(x, scale * factors, self.qmin - zero, self.qmax - zero)
        factor = factors[errors.argmin()]
        return Range(low * factor, high * factor)


def affine_qparams(covered: Range, bits: int) -> tuple[Tensor, Tensor]:
    """Return the step and the zero point of the grid that covers a range, which holds zero.

    What it stands for is fake_quant with the bounds qmin - zero_point and qmax - zero_point.

    Returns:
        The step, 1 for a range of nothing, and the zero point, a whole number of [qmin, qmax]: both
        float32, of shape ().
    """
    qmin, qmax = integer_range(bits)
    tiny = torch.finfo(torch.float32).tiny
    half = covered.high / 2 - covered.low / 2  # the whole may be more than float32 holds
    scale = torch.where(half == 0, 1.0, (half / ((qmax - qmin) / 2)).clamp(min=tiny))
    # NaN or inf have no zero point: whoever looks at the range finds them there
    zero_point = (qmin - torch.round(covered.low / scale)).nan_to_num()
    return scale, zero_point.clamp(qmin, qmax)


def _shrinking(device: torch.device) -> Tensor:
    return (1 - 0.01 * torch.arange(90, dtype=torch.float64)).float().to(device)


class MeanSquaredError(SearchCalibrator):
    """Cover the one of 100 ranges, evenly spaced, that loses the least over all batches.

    They end at the largest magnitude of the first batch. When a later one exceeds it, their spacing
    doubles until they reach it. Every second of them was tried on what came before; to the wider
    ones, which clip nothing of that, the loss is extrapolated by the square of the step. Where the
    first batch holds the largest magnitude, the batches may be split and ordered in any way.
    """

    def __init__(self, bits: int = 8) -> None:
        super().__init__()
        self.bits = bits
        self.qmin, self.qmax = integer_range(bits)
        self._top = 0.0  # of the widest range
        self._losses = torch.zeros(CANDIDATES, dtype=torch.float64)

    def _add(self, x: Tensor) -> None:
        steps = scale_of(self._candidates().to(x.device), self.bits)
        errors = ops.quantization_errors(x, steps, self.qmin, self.qmax)
        self._losses += errors.to(self._losses)

    def _best(self) -> Tensor:
        return self._candidates()[self._losses.argmin()]

    def _candidates(self) -> Tensor:
        return (
            torch.arange(1, CANDIDATES + 1, dtype=torch.float64) / CANDIDATES * self._top
        ).float()

    def _extend(self, absmax: float) -> None:
        self._top = self._top or absmax
        half = CANDIDATES // 2
        wider = torch.arange(half + 1, CANDIDATES + 1) / half
        while self._top < absmax:
            self._top *= 2
            self._losses = torch.cat([self._losses[1::2], self._losses[-1] * wider.square()])
