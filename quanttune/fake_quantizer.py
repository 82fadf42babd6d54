"""Uniform fake quantization: the function, and the grid it rounds to."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import ops, reference


def integer_range(bits: int, narrow: bool = False) -> tuple[int, int]:
    """Return (qmin, qmax) of `bits`-bit signed integers; `narrow` leaves the lowest one out."""
    if not isinstance(bits, int):
        kind = type(bits).__name__
        raise TypeError(f"bits must be a whole number from 2 to 16, got an object of type {kind}")
    if not 2 <= bits <= 16:
        raise ValueError(f"bits must be from 2 to 16, got {bits}")
    qmax = 2 ** (bits - 1) - 1
    return (-qmax if narrow else -qmax - 1), qmax


def scale_of(absmax: Tensor, bits: int) -> Tensor:
    """Return the step that puts `absmax` on the highest level, in float32; 1 where absmax is 0."""
    return reference.scale_of(absmax, integer_range(bits)[1])


class FakeQuant(torch.autograd.Function):
    """Rounds to a grid of constant step."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, qmin: int, qmax: int, axis: int | None
    ) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.grid = qmin, qmax, axis
        return ops.fake_quant(x, scale, qmin, qmax, axis)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale = ctx.saved_tensors
        return ops.fake_quant_backward(grad, x, scale, *ctx.grid), None, None, None, None

    @staticmethod
    def again(grad: Tensor, x: Tensor, scale: Tensor, *grid: Any) -> tuple[Tensor, None]:
        """Round x, change grad to that of x, and return the former and the scale's gradient."""
        return ops.round_again(grad, x, scale, *grid[:2], False)[0], None


def fake_quant(
    x: Tensor,
    scale: Tensor,
    bits: int = 8,
    axis: int | None = None,
    narrow: bool = False,
    zero_point: int = 0,
) -> Tensor:
    """Round x to the `bits`-bit grid of step `scale`, keeping its shape and dtype.

    The codes are those of ONNX QuantizeLinear, bit for bit, on every device. The gradient is
    straight-through: it reaches x wherever its code was not clipped, and never reaches `scale`.

    Args:
        x: floating point, any shape.
        scale: positive float32 on the device of x; one value, or with `axis` one per index of it.
            Values on other devices than the CPU are not checked, since that would wait for them.
        bits: width of the integers, 2 to 16. 8 gives the codes -128 to 127.
        axis: the dimension of x that has a scale per index, for instance 0 for a weight's outputs.
        narrow: leave out the lowest code, so that 8 bits give -127 to 127.
        zero_point: the code of 0, of an affine grid: at 8 bits, -128 gives one from 0 to 255
            steps. 0 is the symmetric grid.

    Raises:
        TypeError: x or scale is of the wrong kind. ValueError: an argument is out of range.

    Source: QuantTune, arXiv 2403.06497, section 3; docs/method.md.
    """
    return FakeQuant.apply(x, scale, *grid_of(x, scale, bits, axis, narrow, zero_point))


def fake_quant_(
    x: Tensor, scale: Tensor, bits: int = 8, axis: int | None = None, narrow: bool = False
) -> Tensor:
    """Round x in place, such as a weight that will not be trained any more; see `fake_quant`.

    Raises:
        RuntimeError: x requires a gradient, which would be lost, and gradients are enabled.
    """
    grid = grid_of(x, scale, bits, axis, narrow)
    if x.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("x requires a gradient: use fake_quant, or torch.no_grad()")
    ops.fake_quant_(x, scale, *grid)
    return x


def grid_of(
    x: Tensor,
    scale: Tensor,
    bits: int,
    axis: int | None,
    narrow: bool = False,
    zero_point: int = 0,
) -> tuple[int, int, int | None]:
    """Check what a grid is made of, and return how many steps it goes down and up, and `axis`."""
    qmin, qmax = integer_range(bits, narrow)
    if not (isinstance(zero_point, int) and qmin <= zero_point <= qmax):
        raise ValueError(f"zero_point must be a code from {qmin} to {qmax}, got {zero_point!r}")
    axis = _check(x, axis)
    if not isinstance(scale, Tensor) or scale.dtype != torch.float32:
        raise TypeError(f"scale must be a float32 tensor, got {_describe(scale)}")
    if scale.device != x.device:
        raise ValueError(f"scale must be on the device of x, {x.device}, got {scale.device}")
    wanted = 1 if axis is None else x.shape[axis]
    if scale.numel() != wanted:
        raise ValueError(f"scale must hold {wanted} value(s), got shape {tuple(scale.shape)}")
    return qmin - zero_point, qmax - zero_point, axis


class DynamicFakeQuant(torch.autograd.Function):
    """Rounds to the grid of the largest magnitude; `rounded` is what came of it before."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bits: int,
        axis: int | None,
        range_gradient: bool,
        rounded: Tensor | None = None,
    ) -> Tensor:
        ctx.grid = *integer_range(bits), axis
        ctx.save_for_backward(*((x,) if range_gradient else ()))
        return ops.dynamic_fake_quant(x, *ctx.grid) if rounded is None else rounded.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # the range is that of x itself, so nothing was clipped
        if ctx.saved_tensors:
            grad = ops.dynamic_fake_quant_backward(grad, *ctx.saved_tensors, *ctx.grid)
        return grad, None, None, None, None

    @staticmethod
    def again(
        grad: Tensor, x: Tensor, bits: int, axis: int | None, range_gradient: bool
    ) -> tuple[Tensor, None]:
        """Round x, and change grad to that of x."""
        return ops.round_again(grad, x, None, *integer_range(bits), range_gradient)[0], None


def dynamic_fake_quant(
    x: Tensor, bits: int = 8, axis: int | None = None, range_gradient: bool = False
) -> Tensor:
    """Round x to the symmetric grid that its own largest magnitude spans.

    Nothing is clipped, so the straight-through gradient is the incoming one. Min-max weights, and
    activations in quantization-aware training, are quantized like this.

    Args:
        x, bits, axis: see `fake_quant`.
        range_gradient: let the largest magnitude (of equal ones the first) get the gradient of the
            step too, which pulls outliers in where rounding to their grid costs much. Keeps x for
            the backward pass.
    """
    integer_range(bits)
    return DynamicFakeQuant.apply(x, bits, _check(x, axis), range_gradient)


def _check(x: object, axis: int | None) -> int | None:
    """Check that x can be quantized along `axis`, and return it counted from the front."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"x must be a floating-point tensor, got {_describe(x)}")
    if axis is None:
        return None
    if not -x.dim() <= axis < x.dim():
        raise ValueError(f"axis must be a dimension of x, which has {x.dim()}, got {axis}")
    return axis % x.dim()


def _describe(x: object) -> str:
    return f"a tensor of {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
