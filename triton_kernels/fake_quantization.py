"""Symmetric fake quantization of a contiguous tensor: one scale, or one per index of an axis."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from quanttune import reference

from ._launch import on_device_of, options
from ._math import quotient_rounded

ELEMENTS = 4096  # per program
THREADS = 128


@triton.jit
def _tile(
    rows,
    columns,
    channels,
    column_tiles,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BY_COLUMN: tl.constexpr,
):
    """Return offsets, mask and channels of the (ROWS, COLUMNS) tile that this program works on."""
    row_tile = tl.program_id(0) // column_tiles
    column_tile = tl.program_id(0) - row_tile * column_tiles
    first_row = row_tile.to(tl.int64) * ROWS
    row = first_row + tl.arange(0, ROWS)[:, None]
    column = column_tile.to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows) & (column < columns)
    if BY_COLUMN:
        channel = column
    else:
        # one 64-bit remainder per program, and 32-bit ones from there
        channel = ((first_row % channels).to(tl.int32) + tl.arange(0, ROWS)[:, None]) % channels
    return row * columns + column, inside, channel


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
    BY_COLUMN: tl.constexpr,
):
    offsets, inside, channel = _tile(
        rows, columns, channels, column_tiles, ROWS, COLUMNS, BY_COLUMN
    )
    scale = tl.load(scale_ptr + channel, mask=channel < channels, other=1.0)
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    y = quotient_rounded(x, scale, qmin, qmax) * scale
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=inside)


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
    qmin,
    qmax,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BY_COLUMN: tl.constexpr,
):
    offsets, inside, channel = _tile(
        rows, columns, channels, column_tiles, ROWS, COLUMNS, BY_COLUMN
    )
    scale = tl.load(scale_ptr + channel, mask=channel < channels, other=1.0)
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + offsets, mask=inside, other=0.0)
    # one step beyond each bound tells "outside" from "at the bound"
    code = quotient_rounded(x, scale, qmin - 1.0, qmax + 1.0)
    passes = (code >= qmin) & (code <= qmax)
    tl.store(result_ptr + offsets, tl.where(passes, grad, 0.0), mask=inside)


def _launch(kernel, tensors: list[Tensor], axis: int | None, qmin: int, qmax: int) -> None:
    """Run a kernel over tensors of one shape, and the scale, which is the last but one of them."""
    shape = tensors[0].shape
    channels = 1 if axis is None else shape[axis]
    # seen as (rows, columns): the scale of row i is that of channel i % channels, or each column
    # is a channel
    columns = tensors[0].numel() if axis is None else math.prod(shape[axis + 1 :])
    by_column = columns == 1
    if by_column:
        columns = channels
    rows = tensors[0].numel() // columns
    column_block = min(ELEMENTS, triton.next_power_of_2(columns))
    row_block = ELEMENTS // column_block
    column_tiles = triton.cdiv(columns, column_block)
    grid = (triton.cdiv(rows, row_block) * column_tiles,)
    with on_device_of(tensors[0]):
        kernel[grid](
            *tensors,
            rows,
            columns,
            channels,
            column_tiles,
            float(qmin),
            float(qmax),
            ROWS=row_block,
            COLUMNS=column_block,
            BY_COLUMN=by_column,
            **options(THREADS),
        )


def fake_quant(
    x: Tensor, scale: Tensor, qmin: int, qmax: int, axis: int | None, out: Tensor | None = None
) -> Tensor:
    if x.dtype == torch.float64:  # float32 arithmetic all the same: not worth a kernel
        return reference.fake_quant(x, scale, qmin, qmax, axis, out)
    y = torch.empty_like(x) if out is None else out
    if x.numel():
        _launch(_forward_kernel, [x, scale, y], axis, qmin, qmax)
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
        _launch(_backward_kernel, [grad, x, scale, result], axis, qmin, qmax)
    return result
