"""What each part of a row leaves of the outlier statistics, and how parts are merged."""

import triton
import triton.language as tl

# one column each; the sums are of a - pivot and its square
PIVOT, SUM, SQUARES, MAXIMUM_OF_PART, COUNT_OF_PART = (tl.constexpr(index) for index in range(5))
PARTIALS = tl.constexpr(5)


@triton.jit
def leave_partials(partial_ptr, sample, parts, part, partials):
    """Store what a part adds to the statistics of its sample."""
    pivot, sums, squares, maximum, count = partials
    column_ptr = partial_ptr + sample * PARTIALS * parts + part
    tl.store(column_ptr + PIVOT * parts, pivot)
    tl.store(column_ptr + SUM * parts, tl.sum(sums))
    tl.store(column_ptr + SQUARES * parts, tl.sum(squares))
    tl.store(column_ptr + MAXIMUM_OF_PART * parts, maximum)
    tl.store(column_ptr + COUNT_OF_PART * parts, tl.cast(count, tl.float32))


@triton.jit
def merge_partials(partial_row_ptr, size, parts, part_size, PARTS: tl.constexpr):
    """Return mean and deviation in float64, the maximum and how many elements attain it."""
    part = tl.arange(0, PARTS)
    inside = part < parts
    column_ptr = partial_row_ptr + part
    pivot = tl.load(column_ptr + PIVOT * parts, mask=inside, other=0.0).to(tl.float64)
    sums = tl.load(column_ptr + SUM * parts, mask=inside, other=0.0).to(tl.float64)
    squares = tl.load(column_ptr + SQUARES * parts, mask=inside, other=0.0).to(tl.float64)
    maxima = tl.load(column_ptr + MAXIMUM_OF_PART * parts, mask=inside, other=-1.0)
    counts = tl.load(column_ptr + COUNT_OF_PART * parts, mask=inside, other=0.0)

    length = tl.minimum(size - part * part_size, part_size)
    length = tl.where(inside, tl.maximum(length, 0), 0).to(tl.float64)
    total = tl.maximum(size, 1).to(tl.float64)
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
