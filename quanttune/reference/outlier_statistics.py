"""The outlier statistics of samples, and their gradient, in plain PyTorch."""

import torch
from torch import Tensor

SAMPLE_SIZE = 65536  # above this many elements per row, the median is that of a stratified sample

# the columns of what `outlier_statistics` returns
MAXIMUM, MEDIAN, MEAN, DEVIATION, RATIO, MAXIMUM_COUNT, MEDIAN_COUNT = range(7)
COLUMNS = 7


def sample_stride(size: int, exact: bool) -> int:
    """Return how many elements of a row of `size` elements make one stratum of its sample."""
    return 1 if exact else max(1, -(-size // SAMPLE_SIZE))


def sample_positions(
    size: int, device: torch.device | str = "cpu", stride: int | None = None
) -> Tensor:
    """Return which elements of a row of `size` elements make its median, as increasing int64
    indices.

    Up to SAMPLE_SIZE elements that is all of them. Above, one element of every stratum [i*k,
    (i+1)*k), picked by a fixed hash of i (the 32-bit mixer "lowbias32"). k = ceil(size /
    SAMPLE_SIZE), or the stride of the padded row that this one is a part of. The picks are as good
    as independent, so by Hoeffding a rank error above e has a probability below 2 exp(-2 n e^2) on
    any data: 4e-6 for 1 % at n = 65,536.
    """
    stride = sample_stride(size, False) if stride is None else stride
    stratum = torch.arange(size // stride, device=device)
    low_bits = 0xFFFFFFFF
    mixed = (stratum * 0x9E3779B1) & low_bits
    mixed = mixed ^ (mixed >> 16)
    mixed = (mixed * 0x7FEB352D) & low_bits
    mixed = mixed ^ (mixed >> 15)
    mixed = (mixed * 0x846CA68B) & low_bits  # int64 wraps, which leaves the low 32 bits right
    mixed = mixed ^ (mixed >> 16)
    return stratum * stride + ((mixed * stride) >> 32)


def outlier_statistics(
    x: Tensor, samples: int, exact: bool, ranges: Tensor | None = None
) -> Tensor:
    """Return the statistics of each sample, of shape (samples, COLUMNS).

    max|A|, the lower median of |A|, mean and deviation (N - 1) of A, the ratio r = (maximum -
    median) / deviation, and how many elements attain the maximum and, of the sampled ones, the
    median.

    A constant sample has deviation 0 and r = 0; a sample that holds NaN or inf has NaN everywhere.
    Float32, for float64 input float64.

    ranges: where the elements of each sample that count begin, and how many they are: int64 of
    shape (samples, 2), in multiples of the last dimension of x. The others are padding. The strata
    of the sample begin where the range does, and keep the stride that the padded row has. A range
    of less than a stratum counts as empty, and has zeros everywhere.
    """
    if samples == 0:
        return x.new_empty((0, COLUMNS), dtype=result_dtype(x))
    rows = x.reshape(samples, -1)
    stride = sample_stride(rows.shape[1], exact)
    if ranges is None:
        return _statistics_of(rows, stride)
    parts = zip(rows, ranges.tolist(), strict=True)
    return torch.cat([_statistics_of(row[None, at : at + n], stride) for row, (at, n) in parts])


def _statistics_of(rows: Tensor, stride: int) -> Tensor:
    size = rows.shape[1]
    if size < stride:
        return rows.new_zeros((len(rows), COLUMNS), dtype=result_dtype(rows))
    x, magnitude = rows, rows.abs()
    maximum = magnitude.amax(1, keepdim=True)
    sampled = magnitude[:, sample_positions(size, x.device, stride)] if stride > 1 else magnitude
    median = sampled.median(1, keepdim=True).values
    wide = rows.to(accumulator_dtype(x))
    mean = wide.mean(1, keepdim=True)
    mean = mean + (wide - mean).mean(1, keepdim=True)  # of a constant: that constant exactly
    deviation = ((wide - mean).square().sum(1, keepdim=True) / max(size - 1, 1)).sqrt()
    spread = maximum.to(wide.dtype) - median.to(wide.dtype)
    ratio = torch.where(deviation == 0, 0, spread / torch.where(deviation == 0, 1, deviation))
    counts = [(magnitude == maximum).sum(1, keepdim=True), (sampled == median).sum(1, keepdim=True)]
    columns = [maximum, median, mean, deviation, ratio, *counts]
    result = torch.cat([column.to(wide.dtype) for column in columns], 1)
    result = torch.where(deviation.isfinite(), result, torch.nan)
    return result.to(result_dtype(x))


def outlier_statistics_backward(
    grad: Tensor,
    x: Tensor,
    statistics: Tensor,
    ratio_grad: Tensor,
    exact: bool,
    detach_deviation: bool,
    ranges: Tensor | None = None,
) -> Tensor:
    """Add to `grad` the gradient of sum(ratio_grad * r) with respect to x.

    dr/da = sign(a) / (count * deviation) on every element at the maximum, the same negated on every
    sampled element at the median, and -r (a - mean) / ((N - 1) deviation^2) everywhere, which
    `detach_deviation` leaves out. A sample with ratio_grad 0 keeps `grad` as it is, and so do one
    whose deviation is 0, or so small (1e-19) that its square is no normal number, and padding: see
    `outlier_statistics`.
    """
    total = grad.clone(memory_format=torch.contiguous_format)
    if x.numel() == 0:
        return total
    samples = len(statistics)
    rows, rows_grad = x.reshape(samples, -1), grad.reshape(samples, -1)
    stride = sample_stride(rows.shape[1], exact)
    results = total.view(samples, -1)
    if ranges is None:
        results[:] = _gradient_of(rows_grad, rows, statistics, ratio_grad, stride, detach_deviation)
        return total
    for i, (at, n) in enumerate(ranges.tolist()):
        one, part = slice(i, i + 1), slice(at, at + n)
        options = statistics[one], ratio_grad[one], stride, detach_deviation
        results[one, part] = _gradient_of(rows_grad[one, part], rows[one, part], *options)
    return total


def _gradient_of(
    rows_grad: Tensor,
    x: Tensor,
    statistics: Tensor,
    ratio_grad: Tensor,
    stride: int,
    detach_deviation: bool,
) -> Tensor:
    rows = x.to(result_dtype(x))
    size = rows.shape[1]
    column = statistics.unbind(1)
    upstream = ratio_grad.to(rows.dtype)
    least = torch.finfo(rows.dtype).tiny ** 0.5
    live = ~(column[DEVIATION] < least) & (upstream != 0)  # NaN stays NaN
    unit = upstream / torch.where(live, column[DEVIATION], 1)
    slope = -unit * column[RATIO] / (torch.where(live, column[DEVIATION], 1) * max(size - 1, 1))
    magnitude, sign = rows.abs(), rows.sign()

    added = torch.zeros_like(rows)
    if not detach_deviation:
        added += slope[:, None] * (rows - column[MEAN][:, None])
    at_maximum = magnitude == column[MAXIMUM][:, None]
    added += (unit / column[MAXIMUM_COUNT])[:, None] * sign * at_maximum
    at_median = magnitude == column[MEDIAN][:, None]
    if stride > 1:
        sampled = torch.zeros(size, dtype=torch.bool, device=x.device)
        at_median &= sampled.index_fill_(0, sample_positions(size, x.device, stride), True)
    added -= (unit / column[MEDIAN_COUNT])[:, None] * sign * at_median

    total = (rows_grad.to(rows.dtype) + added).to(rows_grad.dtype)
    return torch.where(live[:, None], total, rows_grad)


def result_dtype(x: Tensor) -> torch.dtype:
    """Return the type of the statistics of x: float32, for float64 that."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def accumulator_dtype(x: Tensor) -> torch.dtype:
    """Return the type that sums over x are made in."""
    return torch.float32 if x.device.type == "mps" else torch.float64  # MPS has no float64
