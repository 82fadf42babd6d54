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
from ._math import fused_multiply_add
from ._partials import leave_partials
from .sampling import blocks_of_tile, gather, gather_even, load_range, strata, unit_of
from .statistics_group import StatisticsGroup, leave_entry

BLOCK = 1024  # elements of one load of the forward pass: 16 bytes from every thread
MOST_LOADS = 7  # of a tile
TILE = 4 * BLOCK  # where strata are no reason for another
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
def _fold_block(x, inside, pivot, sums, squares, highest):
    """Add a block to the running sums and maxima of every lane."""
    shifted, magnitude = x - pivot, tl.abs(x)
    if inside is not None:
        shifted = tl.where(inside, shifted, 0.0)
        magnitude = tl.where(inside, magnitude, -1.0)
    squares = fused_multiply_add(shifted, shifted, squares)
    return sums + shifted, squares, tl.maximum(highest, magnitude)


@triton.jit
def _count(tile_ptr, length, highest, LOADS: tl.constexpr, BLOCK: tl.constexpr):
    """Read a tile of this length once more: how many of its elements attain the maximum."""
    attained = tl.zeros([BLOCK], tl.int32)
    for load in tl.static_range(LOADS):
        offsets = load * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(tile_ptr + offsets, mask=offsets < length, other=0.0).to(tl.float32)
        attained += ((tl.abs(x) == highest) & (offsets < length)).to(tl.int32)
    return tl.sum(attained)


@triton.jit
def _fold_tile(
    tile_ptr,
    length,
    totals,
    LOADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add a tile, of TILE elements where length is None, to the totals of a part."""
    pivot, sums, squares, maximum, count = totals
    lanes = tl.full([BLOCK], -1.0, tl.float32)
    for load in tl.static_range(LOADS):
        offsets = load * BLOCK + tl.arange(0, BLOCK)
        inside = None if length is None else offsets < length
        x = tl.load(tile_ptr + offsets, mask=inside).to(tl.float32)
        sums, squares, lanes = _fold_block(x, inside, pivot, sums, squares, lanes)
    highest = tl.max(lanes)
    # seldom true after the first tiles, and the same for the whole program
    if highest >= maximum:
        attained = _count(
            tile_ptr, LOADS * BLOCK if length is None else length, highest, LOADS, BLOCK
        )
        count = tl.where(highest > maximum, attained, count + attained)
        maximum = highest
    return pivot, sums, squares, maximum, count


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
    BLOCK_STRATA: tl.constexpr,
    EVEN: tl.constexpr,
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

    pivot = _choose_pivot(part_ptr, length, BLOCK)
    zeros = tl.zeros([BLOCK], tl.float32)
    totals = pivot, zeros, zeros, -1.0, 0
    whole = length // TILE * TILE
    stratum = start // stride
    for tile in range(0, whole, TILE):
        totals = _fold_tile(part_ptr + tile, None, totals, LOADS, BLOCK)
        # right after their neighbours were read, so that they come from the cache
        if EVEN:
            gather_even(row_ptr, sample_row_ptr, stratum, stride, STRATA)
            stratum += STRATA
        elif STRATA > 0:
            first = start + tile
            gather(row_ptr, sample_row_ptr, first, first + TILE, stride, STRATA)
    for block in range(whole, length, BLOCK):
        totals = _fold_tile(part_ptr + block, length - block, totals, 1, BLOCK)
        if STRATA > 0:
            first = start + block
            stop = start + tl.minimum(block + BLOCK, length)
            gather(row_ptr, sample_row_ptr, first, stop, stride, BLOCK_STRATA)

    leave_partials(partial_ptr, row, parts, program % parts, totals)
    if program == 0:
        geometry = samples, size, parts, part_size, stride, sample_pitch
        leave_entry(entry_ptr, sample_ptr, partial_ptr, statistics_ptr, ranges_ptr, *geometry)


def _split(samples: int, size: int, tile: int = TILE) -> tuple[int, int]:
    """Return into how many parts a row is split, and how many elements each but the last has."""
    wanted = max(triton.cdiv(PROGRAMS, samples), triton.cdiv(size, LONGEST_PART))
    parts = min(wanted, MOST_PARTS, triton.cdiv(size, tile))
    part_size = triton.cdiv(triton.cdiv(size, parts), tile) * tile
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
    size = x.numel() // samples
    stride, _ = strata(size, exact)
    loads = blocks_of_tile(stride, MOST_LOADS)
    tile = loads * BLOCK
    rows = merging.reserve(x, samples, exact, *_split(samples, size, tile), ranges)
    sampled = stride > 1
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
            LOADS=loads,
            BLOCK=BLOCK,
            STRATA=triton.next_power_of_2(triton.cdiv(tile, stride)) if sampled else 0,
            BLOCK_STRATA=triton.next_power_of_2(triton.cdiv(BLOCK, stride)),
            EVEN=sampled and tile % stride == 0,
            UNIT=1 if ranges is None else unit_of(x),
            **options(THREADS),
        )
    if group is None:
        merging.finish()
    return rows.statistics
