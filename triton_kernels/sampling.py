"""Which elements of a row make its median: `reference.sample_positions`, stratum by stratum."""

import triton
import triton.language as tl
from torch import Tensor

from quanttune import reference


def strata(size: int, exact: bool) -> tuple[int, int]:
    """Return how many elements a stratum holds, and how many strata a row of `size` elements."""
    stride = 1 if exact else -(-size // reference.SAMPLE_SIZE)
    return stride, size // stride


def blocks_of_tile(stride: int, most: int) -> int:
    """Return how many blocks of 2**n elements make a tile, if possible one of 2**m strata.

    Then no thread idles while the others gather.
    """
    odd = stride // (stride & -stride)
    odd = odd if odd <= most else 1
    return odd * 2 ** ((most // odd).bit_length() - 1)


def unit_of(x: Tensor) -> int:
    """Return a number that divides where ranges begin and end, for the alignment of loads."""
    return 16 if x.dim() and x.shape[-1] % 16 == 0 else 1


@triton.jit
def load_range(ranges_ptr, row, size, stride, UNIT: tl.constexpr):
    """Return where the part of a row begins that is no padding, and its size."""
    begin = 0
    length = size
    if ranges_ptr is not None:
        begin = tl.multiple_of(tl.load(ranges_ptr + 2 * row).to(tl.int32), UNIT)
        length = tl.multiple_of(tl.load(ranges_ptr + 2 * row + 1).to(tl.int32), UNIT)
        length = tl.where(length < stride, 0, length)
    return begin, length


@triton.jit
def position(stratum, stride):
    """Return the index, within its row, of the element that each stratum contributes."""
    mixed = stratum.to(tl.uint32) * 0x9E3779B1
    mixed ^= mixed >> 16
    mixed *= 0x7FEB352D
    mixed ^= mixed >> 15
    mixed *= 0x846CA68B
    mixed ^= mixed >> 16
    wide_stride = tl.full(mixed.shape, stride, tl.uint32)
    return stratum * stride + tl.umulhi(mixed, wide_stride).to(tl.int32)


@triton.jit
def gather(row_ptr, sample_row_ptr, start, stop, stride, STRATA: tl.constexpr):
    """Copy the elements of the strata that end within [start, stop), at most STRATA of them."""
    stratum = start // stride + tl.arange(0, STRATA)
    inside = stratum < stop // stride
    value = tl.load(row_ptr + position(stratum, stride), mask=inside)
    tl.store(sample_row_ptr + stratum, value, mask=inside)


@triton.jit
def gather_even(row_ptr, sample_row_ptr, first, stride, STRATA: tl.constexpr):
    """Copy the elements of STRATA strata, all of which the row has."""
    stratum = first + tl.arange(0, STRATA)
    tl.store(sample_row_ptr + stratum, tl.load(row_ptr + position(stratum, stride)))
