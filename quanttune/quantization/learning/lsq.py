"""Fake quantization whose scale is learned with the weights: LSQ."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ... import ops

SMALLEST = torch.finfo(torch.float32).eps  # of a scale; a step of an optimizer may leave it below 0


def positive(scale: Tensor) -> Tensor:
    """Return the scale that is rounded with, where an optimizer made it too small or negative."""
    return scale.clamp_min(SMALLEST)


class LearnedFakeQuant(torch.autograd.Function):
    """Round x as `fake_quant` does, with a gradient for the scale too.

    Where x / scale rounds to a code inside the range, dy/dscale is the code minus x / scale;
    elsewhere it is the code. The sum of gradient times dy/dscale is divided by
    sqrt(elements per scale * levels above zero), so that a scale moves as fast as the weights do.
    Takes the scale and what `grid_of` returns.

    Source: Esser et al., Learned Step Size Quantization, arXiv 1902.08153, eqs. 3 and 4.
    """

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
        grad_x, grad_scale = ops.learned_fake_quant_backward(grad, x, scale, *ctx.grid)
        return grad_x, grad_scale / norm_of(x, scale, *ctx.grid), None, None, None

    @staticmethod
    def again(grad: Tensor, x: Tensor, scale: Tensor, *grid: Any) -> tuple[Tensor, Tensor]:
        """Round x, change grad to that of x, and return the former and the scale's gradient."""
        y, total = ops.round_again(grad, x, positive(scale), *grid[:2], True)
        return y, torch.zeros_like(scale) + total / norm_of(x, scale, *grid)


def norm_of(x: Tensor, scale: Tensor, qmin: int, qmax: int, axis: int | None) -> float:
    """Return what LSQ divides the gradient of a scale by."""
    levels = max(qmax, -qmin - 1)  # a zero point at the top leaves only codes below 0
    return math.sqrt(max(x.numel(), 1) / scale.numel() * levels)
