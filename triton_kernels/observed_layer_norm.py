"""LayerNorm that observes its input and its output on the way.

A tile is (columns, tokens), so that sums over its first dimension are those of a token. Every
program works on consecutive tokens of one sample.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quanttune.reference import observed_modules

from ._launch import on_device_of, options
from ._partials import leave_partials
from .observed_statistics import fold, start_partials
from .outlier_statistics import LONGEST_PART, MOST_PARTS, PROGRAMS
from .sampling import position
from .statistics_group import StatisticsGroup, leave_entry

MAX_COLUMNS = 16384  # of one token: a program holds them all in registers
ELEMENTS = 16  # of a thread
FEWEST_THREADS = 128


@triton.jit
def load_parameter(parameter_ptr, column, inside, default):
    """Load weight or bias, as float32."""
    if parameter_ptr is None:
        parameter = tl.full(column.shape, default, tl.float32)
    else:
        parameter = tl.load(parameter_ptr + column, mask=inside, other=0.0).to(tl.float32)
    return parameter


@triton.jit
def affine(normalized, weight, bias, DTYPE: tl.constexpr):
    """Return y as it is stored. Both passes call this, and get the same bits."""
    return (normalized * weight + bias).to(DTYPE)


@triton.jit
def _normalize(x, first_ptr, inside, existing, width, eps):
    """Return mean and 1 / deviation of each token, and x in their units."""
    columns = tl.cast(width, tl.float32)
    # by way of its first element, so that the mean of a constant is that constant exactly
    first = tl.load(first_ptr, mask=existing, other=0.0).to(tl.float32)
    excess = tl.sum(tl.where(inside, x - first, 0.0), 0)[None, :]
    mean = first + tl.div_rn(excess, columns)
    centred = tl.where(inside, x - mean, 0.0)
    variance = tl.div_rn(tl.sum(centred * centred, 0)[None, :], columns)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(variance + eps))
    return mean, rstd, centred * rstd


@triton.jit
def _gather(
    x_row_ptr,
    y_row_ptr,
    x_sample_row_ptr,
    y_sample_row_ptr,
    stratum,
    sample_size,
    stride,
    begin,
    stop,
):
    """Copy what these strata contribute to the median's samples, if it lies within [begin, stop).

    Another program may still be writing y elsewhere.
    """
    at = position(stratum, stride)
    ours = (at >= begin) & (at < stop) & (stratum < sample_size)
    tl.store(x_sample_row_ptr + stratum, tl.load(x_row_ptr + at, mask=ours), mask=ours)
    tl.store(y_sample_row_ptr + stratum, tl.load(y_row_ptr + at, mask=ours), mask=ours)


@triton.jit(do_not_specialize=["samples", "parts", "part_size", "stride", "sample_size"])
def _forward_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
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
    width,
    parts,
    part_size,
    stride,
    sample_size,
    sample_pitch,
    eps,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STRATA: tl.constexpr,
):
    """Compute y of the tokens of one part, and what x and y leave for their statistics.

    One function, since a tile of x is loaded once for all of it.
    """
    # backwards: what the producer of x wrote last may still be in the cache
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    sample = (program // parts).to(tl.int64)
    part = program % parts
    tokens = size // width
    part_tokens = part_size // width
    begin = part * part_tokens
    count = tl.minimum(tokens - begin, part_tokens)
    column = tl.arange(0, COLUMNS)[:, None]
    token = tl.arange(0, TOKENS)[None, :]
    x_row_ptr = x_ptr + sample * size
    y_row_ptr = y_ptr + sample * size
    x_sample_row_ptr = x_sample_ptr + sample * sample_pitch
    y_sample_row_ptr = y_sample_ptr + sample * sample_pitch
    rows = x_row_ptr, y_row_ptr, x_sample_row_ptr, y_sample_row_ptr

    x_partials = start_partials(TOKENS)
    y_partials = start_partials(TOKENS)
    for done in range(0, count, TOKENS):
        existing = token < count - done
        inside = (column < width) & existing
        start = (begin + done) * width
        offsets = start + token * width + column
        x = tl.load(x_row_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        first_ptr = x_row_ptr + start + token * width
        mean, rstd, normalized = _normalize(x, first_ptr, inside, existing, width, eps)
        # every time from the cache, which leaves registers to more programs
        weight = load_parameter(weight_ptr, column, column < width, 1.0)
        bias = load_parameter(bias_ptr, column, column < width, 0.0)
        y = affine(normalized, weight, bias, y_ptr.dtype.element_ty)
        tl.store(y_row_ptr + offsets, y, mask=inside)
        moment = sample * tokens + begin + done + token
        tl.store(mean_ptr + moment, mean, mask=existing)
        tl.store(rstd_ptr + moment, rstd, mask=existing)

        elements = tl.minimum(count - done, TOKENS) * width
        x_partials = fold(x_partials, x, inside, elements, done == 0)
        y_partials = fold(y_partials, y.to(tl.float32), inside, elements, done == 0)
        if STRATA > 0:
            # other threads of this program have stored the y that is read here
            tl.debug_barrier()
            strata = start // stride + tl.arange(0, STRATA)
            _gather(*rows, strata, sample_size, stride, begin * width, start + elements)
    if STRATA > 0:
        # the tiles' gathering may have left out the stratum that they end in
        stop = (begin + count) * width
        last = stop // stride + tl.arange(0, 1)
        _gather(*rows, last, sample_size, stride, begin * width, stop)

    leave_partials(x_partial_ptr, sample, parts, part, x_partials)
    leave_partials(y_partial_ptr, sample, parts, part, y_partials)
    if program == 0:
        geometry = None, samples, size, parts, part_size, stride, sample_pitch
        leave_entry(x_entry_ptr, x_sample_ptr, x_partial_ptr, x_statistics_ptr, *geometry)
        leave_entry(y_entry_ptr, y_sample_ptr, y_partial_ptr, y_statistics_ptr, *geometry)


def tile(width: int, elements: int) -> tuple[int, int, int]:
    """Return how many tokens and columns a tile has, and how many threads a program."""
    columns = triton.next_power_of_2(width)
    threads = min(max(columns // elements, FEWEST_THREADS), 1024)
    return max(elements * threads // columns, 1), columns, threads


def part_tokens_of(tokens: int, width: int, samples: int, programs: int, tile_tokens: int) -> int:
    """Return how many tokens of a sample a program works on: whole tiles, but for the last."""
    wanted = max(triton.cdiv(programs, samples), triton.cdiv(tokens * width, LONGEST_PART))
    parts = min(wanted, MOST_PARTS, triton.cdiv(tokens, tile_tokens))
    return triton.cdiv(triton.cdiv(tokens, parts), tile_tokens) * tile_tokens


def observed_layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    samples: int,
    exact: bool,
    group: StatisticsGroup | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See the reference. With a group, the statistics are there once that has been finished."""
    if x.dtype == torch.float64 or x.numel() == 0 or x.shape[-1] > MAX_COLUMNS:
        return observed_modules.observed_layer_norm(x, weight, bias, eps, samples, exact)
    width = x.shape[-1]
    size = x.numel() // samples
    tokens = size // width
    tile_tokens, columns, threads = tile(width, ELEMENTS)
    part_tokens = part_tokens_of(tokens, width, samples, PROGRAMS, tile_tokens)
    parts, part_size = triton.cdiv(tokens, part_tokens), part_tokens * width
    y = torch.empty_like(x)
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2))
    merging = StatisticsGroup() if group is None else group
    of_x, of_y = merging.reserve([x, y], samples, exact, parts, part_size)
    tile_strata = triton.next_power_of_2(triton.cdiv(tile_tokens * width, of_x.stride))
    with on_device_of(x):
        _forward_kernel[(samples * parts,)](
            x,
            weight,
            bias,
            y,
            mean,
            rstd,
            *of_x.buffers,
            *of_y.buffers,
            samples,
            size,
            width,
            parts,
            part_size,
            of_x.stride,
            of_x.sample_size,
            of_x.pitch,
            eps,
            TOKENS=tile_tokens,
            COLUMNS=columns,
            STRATA=0 if of_x.stride == 1 else tile_strata,
            **options(threads),
        )
    if group is None:
        merging.finish()
    return y, mean, rstd, of_x.statistics, of_y.statistics
