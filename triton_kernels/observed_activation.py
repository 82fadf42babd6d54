"""Activations that observe their input and their output on the way, forward and backward."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quanttune.reference import observed_modules

from ._launch import on_device_of, options
from ._partials import leave_partials
from .observed_statistics import (
    add_terms,
    fold,
    is_sampled,
    load_terms,
    sample_mask,
    start_partials,
)
from .outlier_statistics import LONGEST_PART, MOST_PARTS, PROGRAMS
from .sampling import position
from .statistics_group import StatisticsGroup, leave_entry

BLOCK = 1024
LOADS = 2
TILE = LOADS * BLOCK  # elements
BACKWARD_BLOCK = 1024
TILES = 8  # of a program of the backward pass: what it reads of its sample costs as much as one
THREADS = 128

_ROOT_HALF = tl.constexpr(0.7071067811865476)
_ROOT_TWO_OVER_PI = tl.constexpr(0.7978845608028654)
_ONE_OVER_ROOT_TWO_PI = tl.constexpr(0.3989422804014327)
_CUBIC = tl.constexpr(0.044715)


@triton.jit
def _tanh_gate(x):
    """Return x within bounds, the gate (1 + tanh(u)) / 2 = 1 / (1 + exp(-2u)), 1 - gate, and the
    derivative of 2u.
    """
    # beyond 30 the gate is 0 or 1 anyway, and its cube would overflow
    x = tl.clamp(x, -30.0, 30.0, propagate_nan=tl.PropagateNan.ALL)
    square = x * x
    twice = 2.0 * _ROOT_TWO_OVER_PI * x * (1.0 + _CUBIC * square)
    slope = 2.0 * _ROOT_TWO_OVER_PI * (1.0 + 3.0 * _CUBIC * square)
    power = tl.exp(-twice)
    gate = tl.div_rn(1.0, 1.0 + power)
    return x, gate, tl.where(x > 0.0, power * gate, 1.0 - gate), slope


@triton.jit
def _activate(x, KIND: tl.constexpr):
    """Return the activation of float32 values."""
    if KIND == "relu":
        y = tl.where(x <= 0.0, 0.0, x)
    elif KIND == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * _ROOT_HALF))
    else:
        tl.static_assert(KIND == "gelu_tanh")
        _, gate, _, _ = _tanh_gate(x)
        y = x * gate
    return y


@triton.jit
def _derivative(x, KIND: tl.constexpr):
    """Return the derivative of the activation."""
    if KIND == "relu":
        slope = tl.where(x <= 0.0, 0.0, 1.0)
    elif KIND == "gelu":
        density = _ONE_OVER_ROOT_TWO_PI * tl.exp(-0.5 * x * x)
        slope = 0.5 * (1.0 + tl.erf(x * _ROOT_HALF)) + x * density
    else:
        tl.static_assert(KIND == "gelu_tanh")
        bounded, gate, others, gate_slope = _tanh_gate(x)
        slope = gate + bounded * gate * others * gate_slope
    return slope


@triton.jit
def _gather(
    row_ptr,
    x_sample_ptr,
    y_sample_ptr,
    start,
    stop,
    stride,
    KIND: tl.constexpr,
    STRATA: tl.constexpr,
):
    """Copy the elements of the strata that end within [start, stop), and their activation."""
    stratum = start // stride + tl.arange(0, STRATA)
    inside = stratum < stop // stride
    x = tl.load(row_ptr + position(stratum, stride), mask=inside)
    tl.store(x_sample_ptr + stratum, x, mask=inside)
    y = _activate(x.to(tl.float32), KIND).to(x.dtype)
    tl.store(y_sample_ptr + stratum, y, mask=inside)


@triton.jit(do_not_specialize=["samples", "parts", "stride"])
def _forward_kernel(
    x_ptr,
    y_ptr,
    x_sample_ptr,
    x_partial_ptr,
    x_statistics_ptr,
    x_entry_ptr,
    y_sample_ptr,
    y_partial_ptr,
    y_statistics_ptr,
    y_entry_ptr,
    samples,
    size,
    parts,
    part_size,
    stride,
    sample_pitch,
    KIND: tl.constexpr,
    LOADS: tl.constexpr,
    BLOCK: tl.constexpr,
    STRATA: tl.constexpr,
):
    TILE: tl.constexpr = LOADS * BLOCK
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    # backwards: what the producer of x wrote last may still be in the cache
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    sample = (program // parts).to(tl.int64)
    part = program % parts
    start = part * part_size
    row_ptr = x_ptr + sample * size
    length = tl.minimum(size - start, part_size)
    offsets = tl.arange(0, LOADS)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    sampled_from = sample * sample_pitch
    rows = row_ptr, x_sample_ptr + sampled_from, y_sample_ptr + sampled_from

    x_partials = start_partials(BLOCK)
    y_partials = start_partials(BLOCK)
    for tile in range(0, length, TILE):
        first = start + tile
        inside = offsets < size - first
        elements = tl.minimum(size - first, TILE)
        x = tl.load(row_ptr + first + offsets, mask=inside, other=0.0).to(tl.float32)
        y = _activate(x, KIND).to(DTYPE)
        tl.store(y_ptr + sample * size + first + offsets, y, mask=inside)
        x_partials = fold(x_partials, x, inside, elements, tile == 0)
        y_partials = fold(y_partials, y.to(tl.float32), inside, elements, tile == 0)
        if STRATA > 0:
            # right after their neighbours were read, so that they come from the cache
            _gather(*rows, first, first + elements, stride, KIND, STRATA)

    leave_partials(x_partial_ptr, sample, parts, part, x_partials)
    leave_partials(y_partial_ptr, sample, parts, part, y_partials)
    if program == 0:
        geometry = None, samples, size, parts, part_size, stride, sample_pitch
        leave_entry(x_entry_ptr, x_sample_ptr, x_partial_ptr, x_statistics_ptr, *geometry)
        leave_entry(y_entry_ptr, y_sample_ptr, y_partial_ptr, y_statistics_ptr, *geometry)


@triton.jit(do_not_specialize=["parts"])
def _backward_kernel(
    grad_ptr,
    x_ptr,
    x_statistics_ptr,
    y_statistics_ptr,
    x_ratio_grad_ptr,
    y_ratio_grad_ptr,
    mask_ptr,
    result_ptr,
    size,
    parts,
    KIND: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
    DETACHED: tl.constexpr,
):
    # backwards: what the producer of grad wrote last may still be in the cache
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    sample = (program // parts).to(tl.int64)
    start = program % parts * (TILES * BLOCK)
    base = sample * size
    offsets = tl.arange(0, BLOCK)
    x_terms = load_terms(x_statistics_ptr, x_ratio_grad_ptr, sample, size)
    y_terms = load_terms(y_statistics_ptr, y_ratio_grad_ptr, sample, size)
    for tile in range(0, tl.minimum(size - start, TILES * BLOCK), BLOCK):
        first = start + tile
        inside = offsets < size - first
        x = tl.load(x_ptr + base + first + offsets, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + base + first + offsets, mask=inside, other=0.0)
        sampled = is_sampled(mask_ptr, first, offsets, inside, True)
        y = _activate(x, KIND).to(x_ptr.dtype.element_ty).to(tl.float32)
        total = add_terms(grad.to(tl.float32), y, sampled, y_terms, DETACHED)
        total = add_terms(total * _derivative(x, KIND), x, sampled, x_terms, DETACHED)
        tl.store(result_ptr + base + first + offsets, total.to(grad.dtype), mask=inside)


def observed_activation(
    x: Tensor, kind: str, samples: int, exact: bool, group: StatisticsGroup | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """See the reference. With a group, the statistics are there once that has been finished."""
    if x.dtype == torch.float64 or x.numel() == 0:
        return observed_modules.observed_activation(x, kind, samples, exact)
    size = x.numel() // samples
    wanted = max(triton.cdiv(PROGRAMS, samples), triton.cdiv(size, LONGEST_PART))
    parts = min(wanted, MOST_PARTS, triton.cdiv(size, TILE))
    part_size = triton.cdiv(triton.cdiv(size, parts), TILE) * TILE
    parts = triton.cdiv(size, part_size)
    y = torch.empty_like(x)
    merging = StatisticsGroup() if group is None else group
    of_x, of_y = merging.reserve([x, y], samples, exact, parts, part_size)
    tile_strata = triton.next_power_of_2(triton.cdiv(TILE, of_x.stride))
    with on_device_of(x):
        _forward_kernel[(samples * parts,)](
            x,
            y,
            *of_x.buffers,
            *of_y.buffers,
            samples,
            size,
            parts,
            part_size,
            of_x.stride,
            of_x.pitch,
            KIND=kind,
            LOADS=LOADS,
            BLOCK=BLOCK,
            STRATA=0 if of_x.stride == 1 else tile_strata,
            **options(THREADS),
        )
    if group is None:
        merging.finish()
    return y, of_x.statistics, of_y.statistics


def observed_activation_backward(
    grad: Tensor,
    x: Tensor,
    kind: str,
    input_statistics: Tensor,
    output_statistics: Tensor,
    input_ratio_grad: Tensor,
    output_ratio_grad: Tensor,
    exact: bool,
    detach_deviation: bool,
) -> Tensor:
    if x.dtype == torch.float64 or x.numel() == 0:
        return observed_modules.observed_activation_backward(
            grad, x, kind, input_statistics, output_statistics, input_ratio_grad,
            output_ratio_grad, exact, detach_deviation,
        )  # fmt: skip
    samples = len(input_statistics)
    size = x.numel() // samples
    parts = triton.cdiv(size, TILES * BACKWARD_BLOCK)
    result = torch.empty_like(grad)
    with on_device_of(x):
        _backward_kernel[(samples * parts,)](
            grad,
            x,
            input_statistics,
            output_statistics,
            input_ratio_grad.float().contiguous(),
            output_ratio_grad.float().contiguous(),
            sample_mask(x, size, exact),
            result,
            size,
            parts,
            KIND=kind,
            TILES=TILES,
            BLOCK=BACKWARD_BLOCK,
            DETACHED=detach_deviation,
            **options(THREADS),
        )
    return result
