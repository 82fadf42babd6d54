"""What many grids lose of a contiguous tensor, in one read of it."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quanttune.reference import range_search

from ._launch import on_device_of, options
from ._math import WIDEST_BY_PRODUCTS, codes_of

BLOCK = 4096  # elements per program, which keeps them while it tries every step
THREADS = 256


@triton.jit(do_not_specialize=["candidates"])
def _errors_kernel(
    x_ptr,
    steps_ptr,
    partial_ptr,
    size,
    candidates,
    programs,
    qmin,
    qmax,
    BLOCK: tl.constexpr,
    DIVIDES: tl.constexpr,
):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    # what lies beyond the end is 0, and so is its error
    x = tl.load(x_ptr + offsets, mask=offsets < size, other=0.0).to(tl.float32)
    partial_ptr += tl.program_id(0)
    for candidate in range(candidates):
        step = tl.load(steps_ptr + candidate)
        code = codes_of(x, step, qmin, qmax, DIVIDES)
        # a product of 17 and 24 bits is exact
        error = x.to(tl.float64) - code.to(tl.float64) * step.to(tl.float64)
        tl.store(partial_ptr, tl.sum(error * error))
        partial_ptr += programs


def quantization_errors(x: Tensor, steps: Tensor, qmin: int, qmax: int) -> Tensor:
    if x.dtype == torch.float64 or x.numel() == 0 or len(steps) == 0:
        return range_search.quantization_errors(x, steps, qmin, qmax)
    programs = triton.cdiv(x.numel(), BLOCK)
    partials = x.new_empty((len(steps), programs), dtype=torch.float64)
    with on_device_of(x):
        _errors_kernel[(programs,)](
            x,
            steps,
            partials,
            x.numel(),
            len(steps),
            programs,
            float(qmin),
            float(qmax),
            BLOCK=BLOCK,
            DIVIDES=max(-qmin, qmax) > WIDEST_BY_PRODUCTS,
            **options(THREADS),
        )
    return partials.sum(1)
