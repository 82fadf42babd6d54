"""Device functions that more than one kernel needs."""

import triton
import triton.language as tl

# adding 1.5 * 2**23 leaves a float32 no fraction bits
_TO_INTEGER = tl.constexpr(12582912.0)


@triton.jit
def quotient_rounded(x, scale, lowest, highest):
    """Round x / scale, clamped to integer bounds below 2**22, half to even. NaN stays NaN."""
    # Clamping first is the same, since the bounds are integers, and keeps the rounding exact.
    # div_rn, because a plain division on the GPU is not correctly rounded.
    code = tl.clamp(tl.div_rn(x, scale), lowest, highest, propagate_nan=tl.PropagateNan.ALL)
    return (code + _TO_INTEGER) - _TO_INTEGER


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
