"""Outlier statistics of every row of a contiguous tensor, in two launches.

The first reads the data once, with many programs per row; each leaves partial sums and its share of
the median's sample. The second (`statistics_group.py`) has one program per row, which merges and
selects, and can serve many tensors at once. Sums are float32 around a local pivot and are merged in
float64: deviations above 1e15 may overflow them, which gives NaN as inf does, and deviations below
1e-18 lose digits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quanttune import reference

from ._launch import on_device_of, options
from ._partials import leave_partials
from .sampling import gather, load_range, unit_of
from .statistics_group import StatisticsGroup, leave_entry

BLOCK = 1024  # elements of one load of the forward pass: 16 bytes from every thread
LOADS = 4  # in flight at once
TILE = LOADS * BLOCK
THREADS = 128
PROGRAMS = 2048  # enough for any GPU; not asked of it, so that the bits depend on the shape alone
MOST_PARTS = 1024  # of a row: what one program merges
LONGEST_PART = 2**21  # well within the integers that float32 holds


@triton.jit
def _choose_pivot(part_ptr, length, BLOCK: tl.constexpr):
    """Return the mean of the first block; 0 if there is none."""
    offsets = tl.arange(0, BLOCK)
    inside = offsets < length
    # by way of the first element, so that the pivot of a constant is that constant exactly
    first = tl.load(part_ptr, mask=length > 0, other=0.0).to(tl.float32)
    block = tl.load(part_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    excess = tl.sum(tl.where(inside, block - first, 0.0))
    # a correctly rounded division, which is the same on every GPU
    divisor = tl.maximum(tl.minimum(length, BLOCK), 1)
    return first + tl.div_rn(excess, divisor.to(tl.float32))


@triton.jit
def fold_tile(shifted, magnitude, sums, squares, maximum, count):
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


@triton.jit(do_not_specialize=["parts", "stride", "samples"])
def _partial_kernel(
    x_ptr,
    sample_ptr,
    partial_ptr,
    statistics_ptr,
    entry_ptr,
    ranges_ptr,
    samples,
    size,
    parts,
    part_size,
    stride,
    sample_pitch,
    LOADS: tl.constexpr,
    BLOCK: tl.constexpr,
    STRATA: tl.constexpr,
    UNIT: tl.constexpr,
):
    TILE: tl.constexpr = LOADS * BLOCK
    # backwards: what the producer of x wrote last may still be in the cache
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    row = (program // parts).to(tl.int64)
    start = program % parts * part_size
    begin, row_size = load_range(ranges_ptr, row, size, stride, UNIT)
    length = tl.maximum(tl.minimum(row_size - start, part_size), 0)
    row_ptr = x_ptr + row * size + begin
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
        shifted, magnitude = x - pivot, tl.abs(x)
        sums, squares, maximum, count = fold_tile(shifted, magnitude, sums, squares, maximum, count)
        if STRATA > 0:
            # right after their neighbours were read, so that they come from the cache
            first = start + tile
            gather(row_ptr, sample_row_ptr, first, first + TILE, stride, STRATA)
    if whole < length:
        inside = whole + offsets < length
        x = tl.load(part_ptr + whole + offsets, mask=inside, other=0.0).to(tl.float32)
        shifted = tl.where(inside, x - pivot, 0.0)
        magnitude = tl.where(inside, tl.abs(x), -1.0)
        sums, squares, maximum, count = fold_tile(shifted, magnitude, sums, squares, maximum, count)
        if STRATA > 0:
            gather(row_ptr, sample_row_ptr, start + whole, start + length, stride, STRATA)

    partials = pivot, sums, squares, maximum, count
    leave_partials(partial_ptr, row, parts, program % parts, partials)
    if program == 0:
        geometry = samples, size, parts, part_size, stride, sample_pitch
        leave_entry(entry_ptr, sample_ptr, partial_ptr, statistics_ptr, ranges_ptr, *geometry)


def _split(samples: int, size: int) -> tuple[int, int]:
    """Return into how many parts a row is split, and how many elements each but the last has."""
    wanted = max(triton.cdiv(PROGRAMS, samples), triton.cdiv(size, LONGEST_PART))
    parts = min(wanted, MOST_PARTS, triton.cdiv(size, TILE))
    part_size = triton.cdiv(triton.cdiv(size, parts), TILE) * TILE
    return triton.cdiv(size, part_size), part_size


def outlier_statistics(
    x: Tensor,
    samples: int,
    exact: bool,
    ranges: Tensor | None = None,
    group: StatisticsGroup | None = None,
) -> Tensor:
    """See the reference. With a group, the result is there once that has been finished.

    `exact` with more than 65,536 elements per row is slow: one program reads its whole row 32 times
    (16-bit types: 16 times).
    """
    if x.dtype == torch.float64 or samples == 0:  # GPUs that train have no float64 to speak of
        return reference.outlier_statistics(x, samples, exact, ranges)
    merging = StatisticsGroup() if group is None else group
    split = _split(samples, x.numel() // samples)
    rows = merging.reserve(x, samples, exact, *split, ranges)
    tile_strata = triton.next_power_of_2(triton.cdiv(TILE, rows.stride))
    with on_device_of(x):
        _partial_kernel[(samples * rows.parts,)](
            x,
            *rows.buffers,
            ranges,
            samples,
            rows.size,
            rows.parts,
            rows.part_size,
            rows.stride,
            rows.pitch,
            LOADS=LOADS,
            BLOCK=BLOCK,
            STRATA=0 if rows.stride == 1 else tile_strata,
            UNIT=1 if ranges is None else unit_of(x),
            **options(THREADS),
        )
    if group is None:
        merging.finish()
    return rows.statistics
