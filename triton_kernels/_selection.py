"""Device functions that find the lower median of |values| by bisecting its bits."""

import triton
import triton.language as tl

from ._math import magnitude_bits

# a key has 15 bits: the top bit of its half word is a guard that keeps borrows apart
_TOP_KEY = tl.constexpr(0x7FFF)


@triton.jit
def _pack(low, high):
    """Put two arrays of keys into the halves of one, each below a guard bit."""
    return ((low | 0x8000) | ((high | 0x8000) << 16)).to(tl.uint32, bitcast=True)


@triton.jit
def _search(words, rank, HALF: tl.constexpr):
    """Return the packed key of this rank, counted from 0, and how many keys are below it."""
    key = 0
    below = 0
    bit = 0x4000
    while bit > 0:
        candidate = key | bit
        # the guard bit survives the subtraction where the key is not below the candidate
        pair = (candidate | (candidate << 16)).to(tl.uint32)
        survivors = tl.sum(((words - pair) >> 15) & 0x10001).to(tl.uint32)
        smaller = 2 * HALF - ((survivors & 0xFFFF) + (survivors >> 16)).to(tl.int32)
        fits = smaller <= rank
        key = tl.where(fits, candidate, key)
        below = tl.where(fits, smaller, below)
        bit = bit >> 1
    return key, below


@triton.jit
def _load_bits(row_ptr, index, size, TOP: tl.constexpr, CACHE: tl.constexpr, PADDED: tl.constexpr):
    """Load the bits of |values|, TOP beyond the end of the row."""
    # whole pieces of 16 elements, so that threads load 16 bytes at a time
    stop = (size + 15) // 16 * 16 if PADDED else size
    value = tl.load(row_ptr + index, mask=index < stop, other=0.0, cache_modifier=CACHE)
    return tl.where(index < size, magnitude_bits(value), TOP)


@triton.jit
def _lower_key(bits, upper):
    """Return the next 15 bits of the values that begin with `upper`, the top key for others."""
    return tl.where((bits >> 16) == upper, (bits >> 1) & _TOP_KEY, _TOP_KEY)


@triton.jit
def _select_packed(row_ptr, size, rank, HALF: tl.constexpr, PADDED: tl.constexpr):
    """Select among at most 2 * HALF <= 65536 values, read once into registers, two to a word.

    Float32 takes two rounds, the second among those that share their upper bits, and its last bit
    is left at zero.
    """
    low = tl.arange(0, HALF)
    high = low + HALF
    if row_ptr.dtype.element_ty.primitive_bitwidth == 16:
        low_key = _load_bits(row_ptr, low, size, 0x7FFF, "", PADDED)
        high_key = _load_bits(row_ptr, high, size, 0x7FFF, "", PADDED)
        key, _ = _search(_pack(low_key, high_key), rank, HALF)
    else:
        low_key = _load_bits(row_ptr, low, size, 0x7FFFFFFF, "", PADDED) >> 16
        high_key = _load_bits(row_ptr, high, size, 0x7FFFFFFF, "", PADDED) >> 16
        upper, below = _search(_pack(low_key, high_key), rank, HALF)
        # another cache hint, or the compiler takes this for the load above and spills its result
        low_key = _lower_key(_load_bits(row_ptr, low, size, 0x7FFFFFFF, ".cg", PADDED), upper)
        high_key = _lower_key(_load_bits(row_ptr, high, size, 0x7FFFFFFF, ".cg", PADDED), upper)
        lower, _ = _search(_pack(low_key, high_key), rank - below, HALF)
        key = (upper << 16) | (lower << 1)
    return key


@triton.jit
def _tally(row_ptr, size, bits, BLOCK: tl.constexpr, PADDED: tl.constexpr):
    """Read the row once: how many |values| have bits below these, and how many have just these."""
    below = tl.zeros([BLOCK], tl.int32)
    equal = tl.zeros([BLOCK], tl.int32)
    # 64-bit, since the counter passes the end of a row of almost 2**31 elements
    for start in range(0, tl.cast(size, tl.int64), BLOCK):
        row_bits = _load_bits(row_ptr, start + tl.arange(0, BLOCK), size, 0x7FFFFFFF, "", PADDED)
        below += (row_bits < bits).to(tl.int32)
        equal += (row_bits == bits).to(tl.int32)
    return tl.sum(below), tl.sum(equal)


@triton.jit
def _select_streamed(row_ptr, size, rank, BLOCK: tl.constexpr, PADDED: tl.constexpr):
    """Select among any number of values, reading all of them once per bit: correct, and slow."""
    bits = 0
    bit = 1 << (row_ptr.dtype.element_ty.primitive_bitwidth - 2)
    while bit > 0:
        candidate = bits | bit
        below, _ = _tally(row_ptr, size, candidate, BLOCK, PADDED)
        bits = tl.where(below <= rank, candidate, bits)
        bit = bit >> 1
    return bits


@triton.jit
def median_bits(row_ptr, size, HALF: tl.constexpr, BLOCK: tl.constexpr, PADDED: tl.constexpr):
    """Return the bits of the lower median of |values|, and how many attain it.

    HALF is 0 for a row that does not fit the registers. PADDED: the row begins on a boundary of 16
    elements, and what follows it up to the next one may be read.
    """
    rank = (size - 1) // 2
    if HALF == 0:
        bits = _select_streamed(row_ptr, size, rank, BLOCK, PADDED)
    else:
        bits = _select_packed(row_ptr, size, rank, HALF, PADDED)
    below, equal = _tally(row_ptr, size, bits, BLOCK, PADDED)
    # the last bit of float32, which the packed keys have no room for
    if below + equal <= rank:
        bits += 1
        below, equal = _tally(row_ptr, size, bits, BLOCK, PADDED)
    return bits, equal
