"""PACT: the value that is clipped at is learned, by the gradient of what it clips."""

from typing import Any

from torch import Tensor
from torch.autograd.function import once_differentiable

from ... import ops
from .lsq import LearnedFakeQuant, positive


class ClippedFakeQuant(LearnedFakeQuant):
    """Round x as LSQ does; the gradient of the scale is that of its clipping alone.

    What lies at the upper end of the grid or beyond, or below the lower one, has dy/dscale = the
    end's code, and no gradient; all else has its own, and says nothing of the scale. As published
    it is for tensors without negative values, whose grid here has its zero point at the lowest
    code; of others both ends move together. Takes the scale and what `grid_of` returns.

    Source: Choi et al., PACT, arXiv 1805.06085, eqs. 1 to 3.
    """

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_scale = _gradients(grad, *ctx.saved_tensors, *ctx.grid[:2])
        return grad_x, grad_scale, None, None, None

    @staticmethod
    def again(grad: Tensor, x: Tensor, scale: Tensor, *grid: Any) -> tuple[Tensor, Tensor]:
        """Round x, change grad to that of x, and return the former and the scale's gradient."""
        qmin, qmax, axis = grid
        scale = positive(scale)
        grad_x, grad_scale = _gradients(grad, x, scale, qmin, qmax)
        grad.copy_(grad_x)
        return ops.fake_quant(x, scale, qmin, qmax, axis), grad_scale


def _gradients(
    grad: Tensor, x: Tensor, scale: Tensor, qmin: int, qmax: int
) -> tuple[Tensor, Tensor]:
    # of a grid that begins at 0 nothing changes there
    steps, upstream = x.float() / scale, grad.float()
    above, below = steps >= qmax, steps < qmin
    ends = upstream.where(above, 0).sum() * qmax + upstream.where(below, 0).sum() * qmin
    return grad.where(~(above | below), 0), ends.view_as(scale)
