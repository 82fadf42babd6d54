"""Fake quantization whose scale is learned with the weights: LSQ."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import ops
from ..fake_quantizer import integer_range

SMALLEST = torch.finfo(torch.float32).eps  # of a scale; a step of an optimizer may leave it below 0


def positive(scale: Tensor) -> Tensor:
    """Return the scale that is rounded with, where an optimizer made it too small or negative."""
    return scale.clamp_min(SMALLEST)


def learned_fake_quant(
    x: Tensor, scale: Tensor, bits: int = 8, axis: int | None = None, zero_point: int = 0
) -> Tensor:
    """Round x as `fake_quant` does, with a gradient for the scale too.

    Where x / scale rounds to a code inside the range, dy/dscale is the code minus x / scale;
    elsewhere it is the code. The sum of gradient times dy/dscale is divided by
    sqrt(elements per scale * levels above zero), so that a scale moves as fast as the weights do.

    Args:
        x: floating point, any shape.
        scale: float32, one value, or with `axis` one per index of it.
        bits: width of the integers, 2 to 16.
        axis: the dimension of x that has a scale per index, counted from the front.
        zero_point: the code of 0, which is not learned.

    Source: Esser et al., Learned Step Size Quantization, arXiv 1902.08153, eqs. 3 and 4.
    """
    qmin, qmax = integer_range(bits)
    return _LearnedFakeQuant.apply(x, scale, qmin - zero_point, qmax - zero_point, axis)


class _LearnedFakeQuant(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, qmin: int, qmax: int, axis: int | None
    ) -> Tensor:
        scale = positive(scale)
        ctx.save_for_backward(x, scale)
        ctx.grid = qmin, qmax, axis
        return ops.fake_quant(x, scale, qmin, qmax, axis)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale = ctx.saved_tensors
        grad_x = ops.fake_quant_backward(grad, x, scale, *ctx.grid)
        return grad_x, _scale_gradient(grad, x, scale, *ctx.grid), None, None, None


def _scale_gradient(
    grad: Tensor, x: Tensor, scale: Tensor, qmin: int, qmax: int, axis: int | None
) -> Tensor:
    rows = (-1,) if axis is None else (-1, *[1] * (x.dim() - axis - 1))
    steps = x.float() / scale.view(rows)
    codes = steps.round()
    clipped = codes.clamp(qmin, qmax)
    slope = torch.where(codes == clipped, codes - steps, clipped)
    total = grad * slope if axis is None else (grad * slope).movedim(axis, 0)
    total = total.reshape(scale.numel(), -1).sum(1).view_as(scale)
    levels = max(qmax, -qmin - 1)  # a zero point at the top leaves only codes below 0
    return total / math.sqrt(max(x.numel(), 1) / scale.numel() * levels)
