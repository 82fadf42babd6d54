"""The outlier statistics in operations that torch.compile fuses with what makes the tensor.

An op of our own is a wall to the compiler: it reads the tensor once more. These sums and maxima
are taken in the kernel of a LayerNorm or an activation. Only the median of the sample stays an op.
Traced by torch.compile; run by Python they are slow, and right.
"""

import torch
from torch import Tensor

from .. import ops, reference
from ..reference import MEDIAN, MEDIAN_COUNT

outlier_statistics_backward = reference.outlier_statistics_backward


def outlier_statistics(x: Tensor, samples: int, exact: bool, ranges: None = None) -> Tensor:
    """See the reference. Sums are float32 (float64 for that)."""
    rows = x.reshape(samples, -1)
    size = rows.shape[1]
    sampled = rows if exact else rows[:, reference.sample_positions(size, x.device)]
    selected = ops.outlier_statistics(sampled.contiguous(), samples, True)
    wide = rows.to(reference.result_dtype(x))
    highest, lowest = wide.amax(1), wide.amin(1)
    maximum = torch.maximum(highest, -lowest)
    mean = wide.mean(1)
    centred = wide - mean[:, None]
    deviation = (centred.square().sum(1) / max(size - 1, 1)).sqrt()
    # rounding of the mean must not make a deviation of nothing
    deviation = torch.where((highest == lowest) & highest.isfinite(), 0, deviation)
    median = selected[:, MEDIAN]
    ratio = torch.where(
        deviation == 0, 0, (maximum - median) / torch.where(deviation == 0, 1, deviation)
    )
    count = (wide.abs() == maximum[:, None]).sum(1).to(wide.dtype)
    columns = [maximum, median, mean, deviation, ratio, count, selected[:, MEDIAN_COUNT]]
    result = torch.stack(columns, 1)
    return torch.where(deviation.isfinite()[:, None], result, torch.nan)
