"""The gradient of a LayerNorm that observes itself, with that of the ratios of both its sides."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quanttune.reference import observed_modules

from ._launch import on_device_of, options
from .observed_layer_norm import MAX_COLUMNS, affine, load_parameter, part_tokens_of, tile
from .observed_statistics import add_terms, is_sampled, load_terms, sample_mask

ELEMENTS = 8  # of a thread, which holds sums of both parameters' gradients besides
PROGRAMS = 512  # of up to 256 threads: each leaves such sums, to be added up


@triton.jit(do_not_specialize=["parts", "part_tokens"])
def _backward_kernel(
    grad_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    rstd_ptr,
    x_statistics_ptr,
    y_statistics_ptr,
    x_ratio_grad_ptr,
    y_ratio_grad_ptr,
    mask_ptr,
    result_ptr,
    weight_grad_ptr,
    bias_grad_ptr,
    size,
    width,
    parts,
    part_tokens,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BYTES: tl.constexpr,
    DETACHED: tl.constexpr,
):
    """Compute the gradient of the tokens of one part, and its sums for weight and bias.

    One function, since a tile of x and of grad is loaded once for all of it.
    """
    # backwards: what the producer of grad wrote last may still be in the cache
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    sample = (program // parts).to(tl.int64)
    tokens = size // width
    begin = program % parts * part_tokens
    count = tl.minimum(tokens - begin, part_tokens)
    column = tl.arange(0, COLUMNS)[:, None]
    token = tl.arange(0, TOKENS)[None, :]
    columns = tl.cast(width, tl.float32)
    base = sample * size
    x_terms = load_terms(x_statistics_ptr, x_ratio_grad_ptr, sample, size)
    y_terms = load_terms(y_statistics_ptr, y_ratio_grad_ptr, sample, size)

    weight_grad = tl.zeros([COLUMNS, TOKENS], tl.float32)
    bias_grad = tl.zeros([COLUMNS, TOKENS], tl.float32)
    for done in range(0, count, TOKENS):
        existing = token < count - done
        inside = (column < width) & existing
        start = (begin + done) * width
        offsets = start + token * width + column
        x = tl.load(x_ptr + base + offsets, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + base + offsets, mask=inside, other=0.0).to(tl.float32)
        moment = sample * tokens + begin + done + token
        mean = tl.load(mean_ptr + moment, mask=existing, other=0.0)
        rstd = tl.load(rstd_ptr + moment, mask=existing, other=0.0)
        sampled = is_sampled(mask_ptr, start + token * width, column, inside, BYTES)
        # every time from the cache, which leaves registers to more programs
        weight = load_parameter(weight_ptr, column, column < width, 1.0)
        bias = load_parameter(bias_ptr, column, column < width, 0.0)

        normalized = tl.where(inside, x - mean, 0.0) * rstd
        y = affine(normalized, weight, bias, x_ptr.dtype.element_ty).to(tl.float32)
        grad = tl.where(inside, add_terms(grad, y, sampled, y_terms, DETACHED), 0.0)
        weight_grad += grad * normalized
        bias_grad += grad
        grad *= weight
        shift = tl.div_rn(tl.sum(grad, 0)[None, :], columns)
        slope = tl.div_rn(tl.sum(grad * normalized, 0)[None, :], columns)
        total = (grad - shift - normalized * slope) * rstd
        total = add_terms(total, x, sampled, x_terms, DETACHED)
        tl.store(result_ptr + base + offsets, total.to(result_ptr.dtype.element_ty), mask=inside)

    column = tl.arange(0, COLUMNS)
    place = program.to(tl.int64) * width + column
    if weight_grad_ptr is not None:
        tl.store(weight_grad_ptr + place, tl.sum(weight_grad, 1), mask=column < width)
    if bias_grad_ptr is not None:
        tl.store(bias_grad_ptr + place, tl.sum(bias_grad, 1), mask=column < width)


def observed_layer_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    mean: Tensor,
    rstd: Tensor,
    input_statistics: Tensor,
    output_statistics: Tensor,
    input_ratio_grad: Tensor,
    output_ratio_grad: Tensor,
    exact: bool,
    detach_deviation: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    width = x.shape[-1]
    if x.dtype == torch.float64 or x.numel() == 0 or width > MAX_COLUMNS:
        return observed_modules.observed_layer_norm_backward(
            grad, x, weight, bias, eps, mean, rstd, input_statistics, output_statistics,
            input_ratio_grad, output_ratio_grad, exact, detach_deviation,
        )  # fmt: skip
    samples = len(input_statistics)
    size = x.numel() // samples
    tokens = size // width
    tile_tokens, columns, threads = tile(width, ELEMENTS)
    programs = PROGRAMS * 256 // max(threads, 256)
    part_tokens = part_tokens_of(tokens, width, samples, programs, tile_tokens)
    parts = triton.cdiv(tokens, part_tokens)
    result = torch.empty_like(x)
    sums = [
        None if p is None else x.new_empty((samples * parts, width), dtype=torch.float32)
        for p in (weight, bias)
    ]
    with on_device_of(x):
        _backward_kernel[(samples * parts,)](
            grad, x, weight, bias, mean, rstd, input_statistics, output_statistics,
            input_ratio_grad.float().contiguous(), output_ratio_grad.float().contiguous(),
            sample_mask(x, size, exact), result, *sums, size, width, parts, part_tokens,
            TOKENS=tile_tokens, COLUMNS=columns, BYTES=width % 8 == 0, DETACHED=detach_deviation,
            **options(threads),
        )  # fmt: skip
    weight_grad, bias_grad = (
        x.new_empty(0) if p is None or s is None else s.sum(0).to(p.dtype)
        for p, s in zip((weight, bias), sums, strict=True)
    )
    return result, weight_grad, bias_grad
