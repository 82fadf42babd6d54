"""Device functions that more than one kernel needs."""

import triton
import triton.language as tl

# adding 1.5 * 2**23 leaves a float32 no fraction bits
_TO_INTEGER = tl.constexpr(12582912.0)
_ALL = tl.constexpr(tl.PropagateNan.ALL)
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
_SMALL, _LARGE = tl.constexpr(2.0**-64), tl.constexpr(2.0**64)
WIDEST_BY_PRODUCTS = 2**11  # codes of a grid


@triton.jit
def fused_multiply_add(x, y, z):
    """Return x * y + z, rounded once."""
    if _INTERPRETED:  # its own fma rounds the product, too
        total = (x.to(tl.float64) * y.to(tl.float64) + z).to(tl.float32)
    else:
        total = tl.fma(x, y, z)
    return total


@triton.jit
def _rounded(x):
    """Round to an integer, half to even, what is below 2**22."""
    return (x + _TO_INTEGER) - _TO_INTEGER


@triton.jit
def codes_by_division(x, scale, lowest, highest):
    """Round x / scale, clamped to integer bounds below 2**22, half to even. NaN stays NaN."""
    # Clamping first is the same, since the bounds are integers, and keeps the rounding exact.
    # div_rn, because a plain division on the GPU is not correctly rounded.
    return _rounded(tl.clamp(tl.div_rn(x, scale), lowest, highest, propagate_nan=_ALL))


@triton.jit
def _codes_by_products(x, scale, lowest, highest):
    """Return what `codes_by_division` does, for bounds up to 2**11 and ordinary scales.

    1 / scale is taken to 48 bits, a head and a rest, once for all x. Then x * head + x * rest, with
    one fused multiply-add, is on the same side of every boundary between codes as the correctly
    rounded quotient: tests/triton/test_quotients.py lists all x and scale where they could differ.
    (Brisebarre, Muller and Raina, IEEE Transactions on Computers 53(8), 2004.)
    """
    head = tl.div_rn(1.0, scale)
    rest = tl.div_rn(fused_multiply_add(-scale, head, 1.0), scale)
    x = tl.clamp(x, lowest * scale, highest * scale, propagate_nan=_ALL)
    return _rounded(fused_multiply_add(x, head, x * rest))


@triton.jit
def are_ordinary(scale):
    """Return whether no product or quotient of a code and these scales over- or underflows."""
    ordinary = (scale > _SMALL) & (scale < _LARGE)
    if ordinary.type.is_block():
        ordinary = tl.min(ordinary.to(tl.int32)) == 1
    return ordinary


@triton.jit
def codes_of(x, scale, lowest, highest, DIVIDES: tl.constexpr):
    """Return the codes of x: see `codes_by_division`. Where many x share a scale they are cheaper
    by products, but of bounds beyond WIDEST_BY_PRODUCTS not always right.
    """
    if DIVIDES:
        codes = codes_by_division(x, scale, lowest, highest)
    else:
        if are_ordinary(scale):
            codes = _codes_by_products(x, scale, lowest, highest)
        else:
            codes = codes_by_division(x, scale, lowest, highest)
    return codes


@triton.jit
def magnitude_bits(x):
    """Return the bits of |x| as int32: they sort as |x| does, with inf and then NaN on top."""
    if x.dtype.primitive_bitwidth == 32:
        bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    else:
        bits = x.to(tl.int16, bitcast=True).to(tl.int32) & 0x7FFF
    return bits


@triton.jit
def magnitude_of_bits(bits, DTYPE: tl.constexpr):
    """Return the float32 value of what `magnitude_bits` made of a value of type DTYPE."""
    if DTYPE.is_fp16():
        magnitude = bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    elif DTYPE.is_bf16():
        magnitude = (bits << 16).to(tl.float32, bitcast=True)
    else:
        magnitude = bits.to(tl.float32, bitcast=True)
    return magnitude
