"""What the kernels share that observe their input and their output on the way."""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from quanttune import reference

from ._columns import COLUMNS, MAXIMUM, MEAN, MEDIAN
from .outlier_statistics import fold_tile
from .outlier_statistics_gradient import dense_terms, load_weights, peak_term
from .sampling import strata

# ---------------------------------------------------------------------------- forward


@triton.jit
def start_partials(LANES: tl.constexpr):
    """Return what `fold` goes on from: pivot, sums, squares, maximum and its count."""
    zeros = tl.zeros([LANES], tl.float32)
    return (
        tl.full([], 0.0, tl.float32),
        zeros,
        zeros,
        tl.full([], -1.0, tl.float32),
        tl.full([], 0, tl.int32),
    )


@triton.jit
def fold(partials, values, inside, elements, first):
    """Add a tile, of which some elements are inside, to what its part has so far."""
    pivot, sums, squares, maximum, count = partials
    if first:
        pivot = _center(values, inside, elements)
    shifted = tl.where(inside, values - pivot, 0.0)
    magnitude = tl.where(inside, tl.abs(values), -1.0)
    sums, squares, maximum, count = fold_tile(shifted, magnitude, sums, squares, maximum, count)
    return pivot, sums, squares, maximum, count


@triton.jit
def _center(values, inside, elements):
    """Return about the mean of a tile; of a constant it is that constant exactly."""
    anchor = tl.max(tl.where(inside, values, -float("inf")))
    excess = tl.sum(tl.where(inside, values - anchor, 0.0))
    return anchor + tl.div_rn(excess, tl.cast(elements, tl.float32))


# ---------------------------------------------------------------------------- backward


@triton.jit
def load_terms(statistics_ptr, ratio_grad_ptr, sample, size):
    """Return what `add_terms` needs to know of a sample."""
    row_ptr = statistics_ptr + sample * COLUMNS
    upstream = tl.load(ratio_grad_ptr + sample)
    live, slope, maximum_weight, median_weight = load_weights(row_ptr, upstream, size)
    maximum = tl.load(row_ptr + MAXIMUM)
    median = tl.load(row_ptr + MEDIAN)
    return live, slope, maximum_weight, median_weight, maximum, median, tl.load(row_ptr + MEAN)


@triton.jit
def add_terms(grad, x, sampled, terms, DETACHED: tl.constexpr):
    """Add the gradient of the ratio of x's sample to that of x, both float32."""
    live, slope, maximum_weight, median_weight, maximum, median, mean = terms
    added = dense_terms(x, mean, slope, maximum, maximum_weight, DETACHED)
    added -= tl.where(sampled, peak_term(x, median, median_weight), 0.0)
    return tl.where(live, grad + added, grad)


@triton.jit
def is_sampled(mask_ptr, start, offset, inside, BYTES: tl.constexpr):
    """Tell which elements start + offset of a row make its median: all where there is no mask.

    BYTES says that each start is a multiple of 8: then the compiler knows every bit's place.
    """
    if mask_ptr is None:
        sampled = inside
    elif BYTES:
        byte = tl.load(mask_ptr + (start >> 3) + (offset >> 3), mask=inside, other=0)
        sampled = ((byte.to(tl.int32) >> (offset & 7)) & 1) != 0
    else:
        index = start + offset
        byte = tl.load(mask_ptr + (index >> 3), mask=inside, other=0)
        sampled = ((byte.to(tl.int32) >> (index & 7)) & 1) != 0
    return sampled


def sample_mask(x: Tensor, size: int, exact: bool) -> Tensor | None:
    """Return a bit for every element of a row of x: whether it is one of the median's sample.

    The bits lie in bytes, the lowest first. None stands for a row that is its own sample.
    """
    stride, _ = strata(size, exact)
    if stride == 1:
        return None
    # one per stream, so that none is read before it is written
    stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
    return _make_mask(size, stride, x.device, stream)


@lru_cache(maxsize=16)  # a model has about three sizes
def _make_mask(size: int, stride: int, device: torch.device, stream: int) -> Tensor:
    flags = torch.zeros(triton.cdiv(size, 8) * 8, dtype=torch.uint8, device=device)
    flags[reference.sample_positions(size, device)] = 1
    place = torch.arange(8, dtype=torch.uint8, device=device)
    return (flags.view(-1, 8) << place).sum(1, dtype=torch.uint8)
