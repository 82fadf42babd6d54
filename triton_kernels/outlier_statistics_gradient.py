"""The gradient of the outlier statistics, added to the gradient that arrives, in one stream."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quanttune import reference

from ._columns import COLUMNS, DEVIATION, MAXIMUM, MAXIMUM_COUNT, MEAN, MEDIAN, MEDIAN_COUNT, RATIO
from ._launch import on_device_of, options
from .sampling import load_range, position, strata

BLOCK = 2048  # elements per program
THREADS = 128


@triton.jit
def load_weights(row_ptr, upstream, size):
    """Return whether a row has a gradient, then its weights in deviation, maximum and median."""
    deviation = tl.load(row_ptr + DEVIATION)
    # below 2^-63 its square, which the slope divides by, is no normal number
    live = (deviation < 1.0842021724855044e-19) == 0
    live = live & (upstream != 0.0)
    divisor = tl.where(live, deviation, 1.0)
    unit = tl.div_rn(upstream, divisor)
    steps = tl.cast(tl.maximum(size - 1, 1), tl.float32)
    slope = tl.div_rn(-unit * tl.load(row_ptr + RATIO), divisor * steps)
    maximum_weight = tl.div_rn(unit, tl.load(row_ptr + MAXIMUM_COUNT))
    median_weight = tl.div_rn(unit, tl.load(row_ptr + MEDIAN_COUNT))
    # |a| has no gradient at 0, where at least half of a rectified row is
    return live, slope, maximum_weight, tl.where(tl.load(row_ptr + MEDIAN) == 0, 0.0, median_weight)


@triton.jit
def peak_term(x, peak, weight):
    """Return weight * sign(x) where |x| is the peak. Elsewhere weight * 0, which keeps a NaN."""
    return weight * tl.where(x == peak, 1.0, tl.where(x == -peak, -1.0, 0.0))


@triton.jit
def dense_terms(x, mean, slope, maximum, weight, DETACHED: tl.constexpr):
    """Return what elements outside the sample get: the terms of deviation and maximum."""
    added = peak_term(x, maximum, weight)
    if not DETACHED:
        added = slope * (x - mean) + added
    return added


@triton.jit(do_not_specialize=["tiles", "stride", "sample_size"])
def _gradient_kernel(
    grad_ptr,
    x_ptr,
    statistics_ptr,
    ratio_grad_ptr,
    result_ptr,
    ranges_ptr,
    size,
    tiles,
    stride,
    sample_size,
    BLOCK: tl.constexpr,
    STRATA: tl.constexpr,
    DETACHED: tl.constexpr,
):
    # backwards: what the producer of grad wrote last may still be in the cache
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    row = (program // tiles).to(tl.int64)
    start = program % tiles * BLOCK
    offsets = tl.arange(0, BLOCK)
    inside = offsets < size - start
    base = row * size + start
    begin, row_size = load_range(ranges_ptr, row, size, stride, 1)
    if ranges_ptr is not None:
        sample_size = row_size // stride
    # STRATA is how many strata can touch a block, or 0 where every element is in the sample
    if STRATA > 0:
        stratum = tl.maximum(start - begin, 0) // stride + tl.arange(0, STRATA)
        chosen = position(stratum, stride) + (begin - start)
        ours = (chosen >= 0) & (chosen < BLOCK) & (stratum < sample_size)
        chosen_x = tl.load(x_ptr + base + chosen, mask=ours, other=0.0).to(tl.float32)
        chosen_grad = tl.load(grad_ptr + base + chosen, mask=ours, other=0.0)
    x = tl.load(x_ptr + base + offsets, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + base + offsets, mask=inside, other=0.0)

    row_ptr = statistics_ptr + row * COLUMNS
    upstream = tl.load(ratio_grad_ptr + row)
    live, slope, maximum_weight, median_weight = load_weights(row_ptr, upstream, row_size)
    maximum = tl.load(row_ptr + MAXIMUM)
    median = tl.load(row_ptr + MEDIAN)
    mean = tl.load(row_ptr + MEAN)

    added = dense_terms(x, mean, slope, maximum, maximum_weight, DETACHED)
    if STRATA == 0:
        added -= peak_term(x, median, median_weight)
    total = (grad.to(tl.float32) + added).to(grad.dtype)
    if ranges_ptr is not None:
        place = start - begin + offsets
        total = tl.where((place >= 0) & (place < row_size), total, grad)
    tl.store(result_ptr + base + offsets, tl.where(live, total, grad), mask=inside)
    if STRATA > 0:
        added = dense_terms(chosen_x, mean, slope, maximum, maximum_weight, DETACHED)
        added -= peak_term(chosen_x, median, median_weight)
        total = (chosen_grad.to(tl.float32) + added).to(grad.dtype)
        at_median = ours & (tl.abs(chosen_x) == median)
        # other threads of this program store the same elements without the median's term first
        tl.debug_barrier()
        tl.store(result_ptr + base + chosen, tl.where(live, total, chosen_grad), mask=at_median)


def outlier_statistics_backward(
    grad: Tensor,
    x: Tensor,
    statistics: Tensor,
    ratio_grad: Tensor,
    exact: bool,
    detach_deviation: bool,
    ranges: Tensor | None = None,
) -> Tensor:
    if x.dtype == torch.float64 or x.numel() == 0:
        return reference.outlier_statistics_backward(
            grad, x, statistics, ratio_grad, exact, detach_deviation, ranges
        )
    samples = len(statistics)
    size = x.numel() // samples
    tiles = triton.cdiv(size, BLOCK)
    stride, sample_size = strata(size, exact)
    # a block that begins inside a stratum touches one more
    touched = BLOCK // stride + (2 if BLOCK % stride else 0)
    result = torch.empty_like(grad)
    with on_device_of(x):
        _gradient_kernel[(samples * tiles,)](
            grad,
            x,
            statistics,
            ratio_grad.float().contiguous(),
            result,
            ranges,
            size,
            tiles,
            stride,
            sample_size,
            BLOCK=BLOCK,
            STRATA=0 if stride == 1 else triton.next_power_of_2(touched),
            DETACHED=detach_deviation,
            **options(THREADS),
        )
    return result
