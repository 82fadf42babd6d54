"""Outlier statistics of every row of a contiguous tensor, in two launches.

The first reads the data once, with many programs per row; each leaves partial sums and its share of
the median's sample. The second has one program per row, which merges and selects. Sums are float32
around a local pivot and are merged in float64: deviations above 1e15 may overflow them, which gives
NaN as inf does, and deviations below 1e-18 lose digits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quanttune import reference

from ._columns import (
    COLUMNS,
    DEVIATION,
    MAXIMUM,
    MAXIMUM_COUNT,
    MEAN,
    MEDIAN,
    MEDIAN_COUNT,
    RATIO,
)
from ._launch import on_device_of, options
from ._math import magnitude_of_bits
from ._selection import median_bits
from .sampling import gather, strata

BLOCK = 1024  # elements of one load of the forward pass: 16 bytes from every thread
LOADS = 4  # in flight at once
TILE = LOADS * BLOCK
THREADS = 128
PROGRAMS = 2048  # enough for any GPU; not asked of it, so that the bits depend on the shape alone
MOST_PARTS = 1024  # of a row: what one program merges
LONGEST_PART = 2**21  # well within the integers that float32 holds

MERGE_THREADS = 1024
REGISTER_SAMPLE = 65536  # values whose keys fit the registers of one program
MERGE_BLOCK = 8192

# what each program of the forward pass leaves, where the sums are of a - pivot and its square
_PIVOT, _SUM, _SQUARES, _MAXIMUM, _COUNT = (tl.constexpr(index) for index in range(5))
_PARTIALS = tl.constexpr(5)


# ---------------------------------------------------------------------------- forward: one read


@triton.jit
def _choose_pivot(part_ptr, length, BLOCK: tl.constexpr):
    """Return the mean of the first block."""
    offsets = tl.arange(0, BLOCK)
    inside = offsets < length
    # by way of the first element, so that the pivot of a constant is that constant exactly
    first = tl.load(part_ptr).to(tl.float32)
    block = tl.load(part_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    excess = tl.sum(tl.where(inside, block - first, 0.0))
    # a correctly rounded division, which is the same on every GPU
    return first + tl.div_rn(excess, tl.minimum(length, BLOCK).to(tl.float32))


@triton.jit
def _fold(shifted, magnitude, sums, squares, maximum, count):
    """Add a tile to the running sums, maximum and number of elements that attain the maximum."""
    sums += tl.sum(shifted, 0)
    squares += tl.sum(shifted * shifted, 0)
    highest = tl.max(magnitude)
    # seldom true after the first tiles, and the same for the whole program
    if highest >= maximum:
        attained = tl.sum((magnitude == highest).to(tl.int32))
        count = tl.where(highest > maximum, attained, count + attained)
        maximum = highest
    return sums, squares, maximum, count


@triton.jit(do_not_specialize=["parts", "stride"])
def _partial_kernel(
    x_ptr,
    sample_ptr,
    partial_ptr,
    size,
    parts,
    part_size,
    stride,
    sample_pitch,
    LOADS: tl.constexpr,
    BLOCK: tl.constexpr,
    STRATA: tl.constexpr,
):
    TILE: tl.constexpr = LOADS * BLOCK
    # backwards: what the producer of x wrote last may still be in the cache
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    row = (program // parts).to(tl.int64)
    start = program % parts * part_size
    length = tl.minimum(size - start, part_size)
    row_ptr = x_ptr + row * size
    part_ptr = row_ptr + start
    sample_row_ptr = sample_ptr + row * sample_pitch
    offsets = tl.arange(0, LOADS)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]

    pivot = _choose_pivot(part_ptr, length, BLOCK)
    sums = tl.zeros([BLOCK], tl.float32)
    squares = tl.zeros([BLOCK], tl.float32)
    maximum = -1.0
    count = 0
    whole = length // TILE * TILE
    for tile in range(0, whole, TILE):
        x = tl.load(part_ptr + tile + offsets).to(tl.float32)
        sums, squares, maximum, count = _fold(x - pivot, tl.abs(x), sums, squares, maximum, count)
        if STRATA > 0:
            # right after their neighbours were read, so that they come from the cache
            first = start + tile
            gather(row_ptr, sample_row_ptr, first, first + TILE, stride, STRATA)
    if whole < length:
        inside = whole + offsets < length
        x = tl.load(part_ptr + whole + offsets, mask=inside, other=0.0).to(tl.float32)
        shifted = tl.where(inside, x - pivot, 0.0)
        magnitude = tl.where(inside, tl.abs(x), -1.0)
        sums, squares, maximum, count = _fold(shifted, magnitude, sums, squares, maximum, count)
        if STRATA > 0:
            gather(row_ptr, sample_row_ptr, start + whole, start + length, stride, STRATA)

    column_ptr = partial_ptr + row * _PARTIALS * parts + program % parts
    tl.store(column_ptr + _PIVOT * parts, pivot)
    tl.store(column_ptr + _SUM * parts, tl.sum(sums))
    tl.store(column_ptr + _SQUARES * parts, tl.sum(squares))
    tl.store(column_ptr + _MAXIMUM * parts, maximum)
    tl.store(column_ptr + _COUNT * parts, count.to(tl.float32))


# ---------------------------------------------------------------------------- forward: merge


@triton.jit
def _merge(partial_row_ptr, size, parts, part_size, PARTS: tl.constexpr):
    """Return mean and deviation in float64, the maximum and how many elements attain it."""
    part = tl.arange(0, PARTS)
    inside = part < parts
    column_ptr = partial_row_ptr + part
    pivot = tl.load(column_ptr + _PIVOT * parts, mask=inside, other=0.0).to(tl.float64)
    sums = tl.load(column_ptr + _SUM * parts, mask=inside, other=0.0).to(tl.float64)
    squares = tl.load(column_ptr + _SQUARES * parts, mask=inside, other=0.0).to(tl.float64)
    maxima = tl.load(column_ptr + _MAXIMUM * parts, mask=inside, other=-1.0)
    counts = tl.load(column_ptr + _COUNT * parts, mask=inside, other=0.0)

    length = tl.where(inside, tl.minimum(size - part * part_size, part_size), 0).to(tl.float64)
    total = tl.cast(size, tl.float64)
    excess = sums / tl.maximum(length, 1.0)
    part_mean = pivot + excess
    mean = tl.sum(part_mean * length) / total
    distance = part_mean - mean
    # Chan et al.: what the parts deviate in themselves, and what their means deviate
    within = tl.maximum(squares - sums * excess, 0.0, propagate_nan=tl.PropagateNan.ALL)
    variance = tl.sum(within + length * distance * distance) / tl.maximum(total - 1.0, 1.0)
    maximum = tl.max(maxima)
    # as integers: a sum of floats stops counting at 2**24
    count = tl.sum(tl.where(maxima == maximum, counts, 0.0).to(tl.int32))
    return mean, tl.sqrt(variance), maximum, count


@triton.jit(do_not_specialize=["parts"])
def _merge_kernel(
    sample_ptr,
    partial_ptr,
    statistics_ptr,
    size,
    parts,
    part_size,
    sample_size,
    sample_pitch,
    PARTS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    partial_row_ptr = partial_ptr + row * _PARTIALS * parts
    sample_row_ptr = sample_ptr + row * sample_pitch

    mean, deviation, maximum, maximum_count = _merge(partial_row_ptr, size, parts, part_size, PARTS)
    bits, median_count = median_bits(sample_row_ptr, sample_size, HALF, BLOCK)
    median = magnitude_of_bits(bits, sample_ptr.dtype.element_ty)
    spread = maximum.to(tl.float64) - median.to(tl.float64)
    ratio = tl.where(deviation == 0.0, 0.0, spread / tl.where(deviation == 0.0, 1.0, deviation))

    # the sums know of NaN and inf, which the maximum and the median may have passed over
    spoiled = tl.where(deviation - deviation == 0.0, 0.0, float("nan")).to(tl.float32)
    row_ptr = statistics_ptr + row * COLUMNS
    tl.store(row_ptr + MAXIMUM, maximum + spoiled)
    tl.store(row_ptr + MEDIAN, median + spoiled)
    tl.store(row_ptr + MEAN, mean.to(tl.float32) + spoiled)
    tl.store(row_ptr + DEVIATION, deviation.to(tl.float32) + spoiled)
    tl.store(row_ptr + RATIO, ratio.to(tl.float32) + spoiled)
    tl.store(row_ptr + MAXIMUM_COUNT, maximum_count.to(tl.float32) + spoiled)
    tl.store(row_ptr + MEDIAN_COUNT, median_count.to(tl.float32) + spoiled)


def _split(samples: int, size: int) -> tuple[int, int]:
    """Return into how many parts a row is split, and how many elements each but the last has."""
    wanted = max(triton.cdiv(PROGRAMS, samples), triton.cdiv(size, LONGEST_PART))
    parts = min(wanted, MOST_PARTS, triton.cdiv(size, TILE))
    part_size = triton.cdiv(triton.cdiv(size, parts), TILE) * TILE
    return triton.cdiv(size, part_size), part_size


def outlier_statistics(x: Tensor, samples: int, exact: bool) -> Tensor:
    """See the reference. `exact` with more than 65,536 elements per row is slow: one program reads
    its whole row 32 times (16-bit types: 16 times)."""
    if x.dtype == torch.float64 or samples == 0:  # GPUs that train have no float64 to speak of
        return reference.outlier_statistics(x, samples, exact)
    size = x.numel() // samples
    parts, part_size = _split(samples, size)
    stride, sample_size = strata(size, exact)
    # a whole row is its own sample; of any other the first kernel gathers it, on 32-byte boundaries
    pitch = size if stride == 1 else triton.cdiv(sample_size, 16) * 16
    sample = x if stride == 1 else x.new_empty(samples * pitch)
    partials = x.new_empty((samples, 5, parts), dtype=torch.float32)
    statistics = x.new_empty((samples, reference.COLUMNS), dtype=torch.float32)
    half = max(triton.next_power_of_2(sample_size) // 2, 64)
    with on_device_of(x):
        _partial_kernel[(samples * parts,)](
            x,
            sample,
            partials,
            size,
            parts,
            part_size,
            stride,
            pitch,
            LOADS=LOADS,
            BLOCK=BLOCK,
            STRATA=0 if stride == 1 else triton.next_power_of_2(triton.cdiv(TILE, stride)),
            **options(THREADS),
        )
        _merge_kernel[(samples,)](
            sample,
            partials,
            statistics,
            size,
            parts,
            part_size,
            sample_size,
            pitch,
            PARTS=max(triton.next_power_of_2(parts), 16),
            HALF=half if sample_size <= REGISTER_SAMPLE else 0,
            BLOCK=MERGE_BLOCK,
            **options(MERGE_THREADS),
        )
    return statistics
