"""LSQ+: an offset that is learned beside the scale, and a start for the scales of weights."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .lsq import norm_of, positive


class LearnedOffsetFakeQuant(torch.autograd.Function):
    """Round x to a grid whose scale and offset, the value of code 0, are learned.

    The offset that is rounded with is the nearest whole number of steps, so that 0 has a code and
    what is learned stays integers with a zero point; gradients are those of the offset as it is.
    Inside the range dy/dscale is that of LSQ and dy/doffset is 0; outside it they are the code at
    the end, and 1. Sums of both are divided by LSQ's norm.

    Takes x, scale and offset, float32 (), and the lowest and highest code.

    Source: Bhalgat et al., LSQ+, arXiv 2004.09576, eqs. 2 to 4.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, offset: Tensor, qmin: int, qmax: int) -> Tensor:
        scale = positive(scale)
        zero = zero_of(scale, offset, qmin, qmax)
        ctx.save_for_backward(x, scale, zero)
        ctx.grid = qmin, qmax
        codes = (x.float() / scale).round().clamp(qmin - zero, qmax - zero) + 0.0
        return (codes * scale).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, zero = ctx.saved_tensors
        qmin, qmax = ctx.grid
        steps, upstream = x.float() / scale, grad.float()
        codes = steps.round()
        inside = (codes >= qmin - zero) & (codes <= qmax - zero)
        ends = codes.clamp(qmin - zero, qmax - zero) + zero
        norm = norm_of(x, scale, qmin, qmax, None)
        of_scale = (upstream * torch.where(inside, codes - steps, ends)).sum() / norm
        of_offset = upstream.where(~inside, 0).sum() / norm
        return grad.where(inside, 0), of_scale, of_offset, None, None


def zero_of(scale: Tensor, offset: Tensor, qmin: int, qmax: int) -> Tensor:
    """Return the code of 0, a whole number in float32, of a grid whose code 0 is at an offset."""
    return (-offset / scale).round().clamp(qmin, qmax) + 0.0


def three_sigma_scale(weight: Tensor, bits: int, axis: int | None) -> Tensor:
    """Return the scales that LSQ+ begins with: max |mean +- 3 deviations| on 2^(bits - 1) levels.

    Of each index of `axis`, or of the tensor; 1 where all is 0. Deviations are those of the
    population.
    """
    others = [dim for dim in range(weight.dim()) if dim != axis]
    deviation, mean = torch.std_mean(weight.detach().float(), others, correction=0)
    scale = (mean.abs() + 3 * deviation) / 2 ** (bits - 1)
    return positive(torch.where(scale == 0, 1.0, scale))
