"""Symmetric fake quantization of a contiguous tensor: one scale, or one per index of an axis."""

import math
from functools import cache
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from quanttune import reference

from ._launch import on_device_of, options
from ._math import WIDEST_BY_PRODUCTS, codes_of

BYTES = 16384  # of each tensor, per program
ELEMENTS = 4096  # of a program where each column has a scale of its own
THREADS = 128


@triton.jit
def _tile(
    rows,
    columns,
    channels,
    column_tiles,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Return where the tile of a program begins, offsets, whether whole, mask and channels."""
    if CHANNELS == "none":
        begin = tl.program_id(0).to(tl.int64) * COLUMNS
        offsets = tl.arange(0, COLUMNS)
        left = columns - begin
        whole = left >= COLUMNS
        inside = offsets < tl.minimum(left, COLUMNS).to(tl.int32)
        channel = 0
    else:
        row_tile = tl.program_id(0) // column_tiles
        column_tile = tl.program_id(0) - row_tile * column_tiles
        first_row = row_tile.to(tl.int64) * ROWS
        row = tl.arange(0, ROWS)[:, None]
        first_column = column_tile.to(tl.int64) * COLUMNS
        column = first_column + tl.arange(0, COLUMNS)[None, :]
        whole = (first_row + ROWS <= rows) & (first_column + COLUMNS <= columns)
        inside = (row < rows - first_row) & (column < columns)
        begin = first_row * columns
        offsets = row * columns + column
        if CHANNELS == "columns":
            channel = column
        else:
            # one 64-bit remainder per program, and 32-bit ones from there
            channel = ((first_row % channels).to(tl.int32) + row) % channels
    return begin, offsets, whole, inside, channel


@triton.jit
def _snap(x_ptr, y_ptr, inside, scale, qmin, qmax, DIVIDES: tl.constexpr):
    x = tl.load(x_ptr, mask=inside).to(tl.float32)
    y = codes_of(x, scale, qmin, qmax, DIVIDES) * scale
    tl.store(y_ptr, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _forward_kernel(
    x_ptr,
    scale_ptr,
    y_ptr,
    rows,
    columns,
    channels,
    column_tiles,
    qmin,
    qmax,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
    NARROW: tl.constexpr,
):
    begin, offsets, whole, inside, channel = _tile(
        rows, columns, channels, column_tiles, ROWS, COLUMNS, CHANNELS
    )
    scale = tl.load(scale_ptr + channel, mask=channel < channels, other=1.0)
    # of columns there are as many scales as a row has elements
    DIVIDES: tl.constexpr = not NARROW or CHANNELS == "columns"
    if whole:
        _snap(x_ptr + begin + offsets, y_ptr + begin + offsets, None, scale, qmin, qmax, DIVIDES)
    else:
        _snap(x_ptr + begin + offsets, y_ptr + begin + offsets, inside, scale, qmin, qmax, DIVIDES)


@triton.jit
def _last_inside(scale, inside, outside):
    """Return the largest x whose quotient is at most `inside`; `outside` is the next float32."""
    # Quotients are never halfway between two floats. This product has 49 bits, and is exact.
    middle = (tl.cast(inside, tl.float64) + tl.cast(outside, tl.float64)) * 0.5
    boundary = middle * scale.to(tl.float64)
    boundary = tl.where((scale > 0) & (scale < float("inf")), boundary, float("nan"))
    nearest = boundary.to(tl.float32)
    bits = nearest.to(tl.int32, bitcast=True)
    below = (bits - tl.where(nearest > 0, 1, -1)).to(tl.float32, bitcast=True)
    return tl.where(nearest.to(tl.float64) > boundary, below, nearest)


@triton.jit
def _backward_kernel(
    grad_ptr,
    x_ptr,
    scale_ptr,
    result_ptr,
    rows,
    columns,
    channels,
    column_tiles,
    low_inside,
    low_outside,
    high_inside,
    high_outside,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    begin, offsets, _, inside, channel = _tile(
        rows, columns, channels, column_tiles, ROWS, COLUMNS, CHANNELS
    )
    scale = tl.load(scale_ptr + channel, mask=channel < channels, other=1.0)
    # first, or comparisons would be kept in registers while it arrives
    grad = tl.load(grad_ptr + begin + offsets, mask=inside)
    x = tl.load(x_ptr + begin + offsets, mask=inside).to(tl.float32)
    lowest = -_last_inside(scale, low_inside, low_outside)
    highest = _last_inside(scale, high_inside, high_outside)
    passes = (x >= lowest) & (x <= highest)
    tl.store(result_ptr + begin + offsets, tl.where(passes, grad, 0.0), mask=inside)


def _launch(
    kernel: Any, tensors: list[Tensor], axis: int | None, bounds: list[float], **constants: bool
) -> None:
    """Run a kernel over tensors of one shape, and the scale, which is the last but one of them."""
    shape = tensors[0].shape
    channels = 1 if axis is None else shape[axis]
    # seen as (rows, columns): the scale of row i is that of channel i % channels, or each column
    # is a channel
    columns = tensors[0].numel() if axis is None else math.prod(shape[axis + 1 :])
    by_column = columns == 1 and axis is not None
    if by_column:
        columns = channels
    rows = tensors[0].numel() // columns
    block = ELEMENTS if by_column else BYTES // tensors[0].element_size()
    block = ELEMENTS if by_column else BYTES // tensors[0].element_size()
    column_block = block if axis is None else min(block, triton.next_power_of_2(columns))
    row_block = block // column_block
    column_tiles = triton.cdiv(columns, column_block)
    grid = (triton.cdiv(rows, row_block) * column_tiles,)
    with on_device_of(tensors[0]):
        kernel[grid](
            *tensors,
            rows,
            columns,
            channels,
            column_tiles,
            *bounds,
            ROWS=row_block,
            COLUMNS=column_block,
            CHANNELS="none" if axis is None else "columns" if by_column else "rows",
            **constants,
            **options(THREADS),
        )


@cache
def _edge(bound: int) -> tuple[float, float]:
    """Return the largest float32 that rounds to a code of at most `bound`, and the next one."""
    half, infinity = np.float32(bound + 0.5), np.float32(np.inf)
    if bound % 2:  # a tie goes to the even code, the next one
        return float(np.nextafter(half, -infinity)), float(half)
    return float(half), float(np.nextafter(half, infinity))


def fake_quant(
    x: Tensor, scale: Tensor, qmin: int, qmax: int, axis: int | None, out: Tensor | None = None
) -> Tensor:
    if x.dtype == torch.float64:  # float32 arithmetic all the same: not worth a kernel
        return reference.fake_quant(x, scale, qmin, qmax, axis, out)
    y = torch.empty_like(x) if out is None else out
    if x.numel():
        bounds = [float(qmin), float(qmax)]
        narrow = max(-qmin, qmax) <= WIDEST_BY_PRODUCTS
        _launch(_forward_kernel, [x, scale, y], axis, bounds, NARROW=narrow)
    return y


def dynamic_fake_quant(x: Tensor, qmin: int, qmax: int, axis: int | None) -> Tensor:
    if x.dtype == torch.float64:
        return reference.dynamic_fake_quant(x, qmin, qmax, axis)
    scale = reference.scale_of(reference.absmax(x, axis), qmax)
    return fake_quant(x, scale, qmin, qmax, axis)


def fake_quant_backward(
    grad: Tensor, x: Tensor, scale: Tensor, qmin: int, qmax: int, axis: int | None
) -> Tensor:
    if x.dtype == torch.float64:
        return reference.fake_quant_backward(grad, x, scale, qmin, qmax, axis)
    result = torch.empty_like(grad)
    if x.numel():
        bounds = [*_edge(-qmin), *_edge(qmax)]
        _launch(_backward_kernel, [grad, x, scale, result], axis, bounds)
    return result
