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


class _FakeQuant(torch.autograd.Function):
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
    return _FakeQuant.apply(x, scale, *_check_grid(x, scale, bits, axis, narrow, zero_point))


def fake_quant_(
    x: Tensor, scale: Tensor, bits: int = 8, axis: int | None = None, narrow: bool = False
) -> Tensor:
    """Round x in place, such as a weight that will not be trained any more; see `fake_quant`.

    Raises:
        RuntimeError: x requires a gradient, which would be lost, and gradients are enabled.
    """
    grid = _check_grid(x, scale, bits, axis, narrow)
    if x.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("x requires a gradient: use fake_quant, or torch.no_grad()")
    ops.fake_quant_(x, scale, *grid)
    return x


def _check_grid(
    x: Tensor, scale: Tensor, bits: int, axis: int | None, narrow: bool, zero_point: int = 0
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


class _DynamicFakeQuant(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: int, axis: int | None, range_gradient: bool) -> Tensor:
        y = ops.dynamic_fake_quant(x, *integer_range(bits), axis)
        ctx.axis = axis
        ctx.save_for_backward(*((x, y) if range_gradient else ()))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # the range is that of x itself, so nothing was clipped
        if ctx.saved_tensors:
            x, y = ctx.saved_tensors
            grad = _with_range_gradient(grad, x, y, ctx.axis)
        return grad, None, None, None


def _with_range_gradient(grad: Tensor, x: Tensor, y: Tensor, axis: int | None) -> Tensor:
    """Add what the largest magnitude of each grid gets by way of its step.

    With the code held constant, y = code * step, so dy/dstep is (y - x) / step beside the
    straight-through gradient; and the step is that magnitude over the highest code.
    """

    def rows(t: Tensor) -> Tensor:
        return t.reshape(1, -1) if axis is None else t.movedim(axis, 0).reshape(t.shape[axis], -1)

    if not x.numel():
        return grad
    error = rows(grad).float() * (rows(y).float() - rows(x).float())
    at = rows(x).abs().argmax(1, keepdim=True)
    largest = rows(x).gather(1, at).float()
    slope = torch.where(largest == 0, 0.0, error.sum(1, keepdim=True) / largest)
    added = rows(grad).scatter_add(1, at, slope.to(grad.dtype))
    if axis is None:
        return added.view_as(grad)
    return added.view_as(grad.movedim(axis, 0)).movedim(0, axis)


def dynamic_fake_quant(
    x: Tensor, bits: int = 8, axis: int | None = None, range_gradient: bool = False
) -> Tensor:
    """Round x to the symmetric grid that its own largest magnitude spans.

    Nothing is clipped, so the straight-through gradient is the incoming one. Min-max weights, and
    activations in quantization-aware training, are quantized like this.

    Args:
        x, bits, axis: see `fake_quant`.
        range_gradient: let the largest magnitude (of equal ones the first) get the gradient of the
            step too, which pulls outliers in where rounding to their grid costs much. Keeps x and
            its rounded values for the backward pass.
    """
    integer_range(bits)
    return _DynamicFakeQuant.apply(x, bits, _check(x, axis), range_gradient)


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
