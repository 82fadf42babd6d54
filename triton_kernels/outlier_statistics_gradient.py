"""The gradient of the outlier statistics, added to the gradient that arrives, in one stream."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quanttune import reference

from ._columns import COLUMNS, DEVIATION, MAXIMUM, MAXIMUM_COUNT, MEAN, MEDIAN, MEDIAN_COUNT, RATIO
from ._launch import on_device_of, options
from ._math import fused_multiply_add
from .sampling import blocks_of_tile, load_range, position, strata

THREADS = 128
BLOCK = 16 * THREADS  # bytes of one load
MOST_LOADS = 6  # of a tile, all in flight at once


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
def _at_peak(x, peak, weight):
    """Return weight * sign(x) where |x| is the peak, and 0 elsewhere."""
    sign = x.to(tl.int32, bitcast=True) & -0x80000000
    signed = (weight.to(tl.int32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)
    return tl.where(tl.abs(x) == peak, signed, 0.0)


@triton.jit
def _everywhere(x, mean, slope, spoiled, DETACHED: tl.constexpr):
    """Return slope * (x - mean), rounded as a product is; of a spoiled row NaN."""
    return spoiled if DETACHED else fused_multiply_add(slope, x - mean, spoiled)


@triton.jit
def _offsets(load, base, start, begin, size, row_size, BLOCK: tl.constexpr, RANGED: tl.constexpr):
    """Return where a block is, and which of its elements are of the row, and no padding."""
    offsets = load * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < size - start
    counts = inside
    if RANGED:
        place = start - begin + offsets
        counts = (place >= 0) & (place < row_size)
    return base + offsets, inside, counts


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
    LOADS: tl.constexpr,
    BLOCK: tl.constexpr,
    STRATA: tl.constexpr,
    DETACHED: tl.constexpr,
):
    """One function, since all of it needs the place of a tile and the weights of its row."""
    RANGED: tl.constexpr = ranges_ptr is not None
    # backwards: what the producer of grad wrote last may still be in the cache
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    row = (program // tiles).to(tl.int64)
    start = program % tiles * (LOADS * BLOCK)
    base = row * size + start
    begin, row_size = load_range(ranges_ptr, row, size, stride, 1)
    grads, xs = (), ()
    for load in tl.static_range(LOADS):
        at, inside, _ = _offsets(load, base, start, begin, size, row_size, BLOCK, RANGED)
        grads += (tl.load(grad_ptr + at, mask=inside, other=0.0),)
        xs += (tl.load(x_ptr + at, mask=inside, other=0.0),)

    row_ptr = statistics_ptr + row * COLUMNS
    upstream = tl.load(ratio_grad_ptr + row)
    live, slope, maximum_weight, median_weight = load_weights(row_ptr, upstream, row_size)
    maximum = tl.load(row_ptr + MAXIMUM)
    median = tl.load(row_ptr + MEDIAN)
    mean = tl.load(row_ptr + MEAN)
    spoiled = maximum_weight * 0.0
    if live:
        lanes = tl.full([BLOCK], -1.0, tl.float32)
        for load in tl.static_range(LOADS):
            at, inside, counts = _offsets(load, base, start, begin, size, row_size, BLOCK, RANGED)
            grad, x = grads[load], xs[load].to(tl.float32)
            lanes = tl.maximum(lanes, tl.abs(x))
            added = _everywhere(x, mean, slope, spoiled, DETACHED)
            if STRATA == 0:
                added -= _at_peak(x, median, median_weight)
            total = (grad.to(tl.float32) + added).to(grad.dtype)
            if RANGED:
                total = tl.where(counts, total, grad)
            tl.store(result_ptr + at, total, mask=inside)
        # seldom true, and the same for the whole program
        if tl.max(lanes) >= maximum:
            # other threads of this program may store the same elements without these terms first
            tl.debug_barrier()
            for load in tl.static_range(LOADS):
                at, inside, counts = _offsets(
                    load, base, start, begin, size, row_size, BLOCK, RANGED
                )
                grad = tl.load(grad_ptr + at, mask=inside, other=0.0)
                x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
                added = _everywhere(x, mean, slope, spoiled, DETACHED)
                added += _at_peak(x, maximum, maximum_weight)
                if STRATA == 0:
                    added -= _at_peak(x, median, median_weight)
                total = (grad.to(tl.float32) + added).to(grad.dtype)
                tl.store(result_ptr + at, total, mask=counts & (tl.abs(x) == maximum))
        # STRATA is how many strata can touch a tile, or 0 where every element is in the sample
        if STRATA > 0:
            if RANGED:
                sample_size = row_size // stride
            stratum = tl.maximum(start - begin, 0) // stride + tl.arange(0, STRATA)
            chosen = position(stratum, stride) + (begin - start)
            ours = (chosen >= 0) & (chosen < LOADS * BLOCK) & (stratum < sample_size)
            x = tl.load(x_ptr + base + chosen, mask=ours, other=-1.0).to(tl.float32)
            at_median = ours & (tl.abs(x) == median)
            grad = tl.load(grad_ptr + base + chosen, mask=at_median, other=0.0)
            # x is the median, or that negated: two sums serve all
            above = _everywhere(median, mean, slope, spoiled, DETACHED)
            above += _at_peak(median, maximum, maximum_weight) - median_weight
            below = _everywhere(-median, mean, slope, spoiled, DETACHED)
            below += _at_peak(-median, maximum, maximum_weight) + median_weight
            total = (grad.to(tl.float32) + tl.where(x > 0, above, below)).to(grad.dtype)
            tl.debug_barrier()
            tl.store(result_ptr + base + chosen, total, mask=at_median)
    else:
        for load in tl.static_range(LOADS):
            at, inside, _ = _offsets(load, base, start, begin, size, row_size, BLOCK, RANGED)
            tl.store(result_ptr + at, grads[load], mask=inside)


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
    stride, sample_size = strata(size, exact)
    loads = blocks_of_tile(stride, MOST_LOADS if ranges is None else 2)
    block = BLOCK // x.element_size()
    tile = loads * block
    tiles = triton.cdiv(size, tile)
    # a tile that begins inside a stratum touches one more
    touched = tile // stride + (2 if tile % stride or ranges is not None else 0)
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
            LOADS=loads,
            BLOCK=block,
            STRATA=0 if stride == 1 else triton.next_power_of_2(touched),
            DETACHED=detach_deviation,
            **options(THREADS),
        )
    return result
