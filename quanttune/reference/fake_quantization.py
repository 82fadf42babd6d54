"""Fake quantization in plain PyTorch."""

import math

import torch
from torch import Tensor


def fake_quant(
    x: Tensor, scale: Tensor, qmin: int, qmax: int, axis: int | None, out: Tensor | None = None
) -> Tensor:
    """Snap x to the grid of step s: code = clamp(rint(x / s), qmin, qmax), y = code * s.

    x goes to float32 first and y is cast once. rint rounds halves to even, x / s is the correctly
    rounded quotient and there is no negative zero: ONNX QuantizeLinear, bit for bit. NaN stays NaN.
    On CPU, a scale that is not finite and positive is an error; `out` may be x.
    """
    if scale.device.type == "cpu":
        good = scale.isfinite() & (scale > 0)
        if not good.all():
            raise ValueError(f"scale must be finite and positive, got {scale[~good][0].item():g}")
    y = _snap(x, _along(axis, scale, x), qmin, qmax)
    return y if out is None else out.copy_(y)


def dynamic_fake_quant(x: Tensor, qmin: int, qmax: int, axis: int | None) -> Tensor:
    """Snap x to the grid that puts max|x|, of all x or of each index of `axis`, on qmax."""
    scale = scale_of(absmax(x, axis), qmax)
    return _snap(x, _along(axis, scale, x), qmin, qmax)


def absmax(x: Tensor, axis: int | None = None) -> Tensor:
    """Return max|x| of all x, or of each index of `axis`. Of nothing it is 0."""
    others = list(range(x.dim())) if axis is None else [d for d in range(x.dim()) if d != axis]
    if x.numel() == 0:
        return x.sum(others)
    if not others:  # amax takes that for all dimensions
        return x.abs()
    low, high = torch.aminmax(x) if axis is None else (x.amin(others), x.amax(others))
    return torch.maximum(-low, high)


def scale_of(absmax: Tensor, qmax: int) -> Tensor:
    """Return the step that puts `absmax` on `qmax`, in float32; 1 where absmax is 0."""
    # an absmax near the smallest float would make a step of 0
    step = (absmax.float() / qmax).clamp(min=torch.finfo(torch.float32).tiny)
    return torch.where(absmax == 0, 1.0, step)


def _snap(x: Tensor, step: Tensor, qmin: int, qmax: int) -> Tensor:
    code = torch.round(x.float() / step).clamp(qmin, qmax) + 0.0  # + 0.0 turns -0 into 0
    return (code * step).to(x.dtype)


def fake_quant_backward(
    grad: Tensor, x: Tensor, scale: Tensor, qmin: int, qmax: int, axis: int | None
) -> Tensor:
    """Pass the gradient straight through wherever qmin <= rint(x / s) <= qmax, else zero."""
    code = torch.round(x.float() / _along(axis, scale, x))
    return torch.where((code >= qmin) & (code <= qmax), grad, 0.0)


def learned_fake_quant_backward(
    grad: Tensor, x: Tensor, scale: Tensor, qmin: int, qmax: int, axis: int | None
) -> tuple[Tensor, Tensor]:
    """Return what `fake_quant_backward` does, and the gradient of the scale.

    That is the sum of grad times dy/ds: the code less x / s, and where it was clipped the code.
    """
    steps = x.float() / _along(axis, scale, x)
    codes = steps.round()
    clipped = codes.clamp(qmin, qmax)
    total = grad * torch.where(codes == clipped, codes - steps, clipped)
    total = total if axis is None else total.movedim(axis, 0)
    sums = total.reshape(scale.numel(), math.prod(total.shape) // max(scale.numel(), 1)).sum(1)
    grad_x = fake_quant_backward(grad, x, scale, qmin, qmax, axis)
    return grad_x, sums.to(scale.dtype).view_as(scale)


def dynamic_fake_quant_backward(
    grad: Tensor, x: Tensor, qmin: int, qmax: int, axis: int | None
) -> Tensor:
    """Return grad, and what the largest magnitude of each grid gets by way of its step.

    It is the first of equal ones; where it is 0, the step does not depend on it.
    """
    if not x.numel():
        return grad.clone()
    scale = scale_of(absmax(x, axis), qmax)
    grad_x, slope = learned_fake_quant_backward(grad, x, scale, qmin, qmax, axis)

    def rows(t: Tensor) -> Tensor:
        return t.reshape(1, -1) if axis is None else t.movedim(axis, 0).reshape(t.shape[axis], -1)

    places = rows(x).abs().argmax(1, keepdim=True)
    largest = rows(x).gather(1, places).float()
    slope = torch.where(largest == 0, 0.0, (slope * scale).reshape(-1, 1) / largest)
    added = rows(grad_x).scatter_add(1, places, slope.to(grad.dtype))
    if axis is None:
        return added.view_as(grad)
    return added.view_as(grad.movedim(axis, 0)).movedim(0, axis)


def round_again(
    grad: Tensor, x: Tensor, scale: Tensor | None, qmin: int, qmax: int, slope: bool
) -> tuple[Tensor, float | Tensor]:
    """Return the rounded x and the gradient of its one scale; grad is changed to that of x.

    It is for a backward that has not kept the rounded x. Without a scale the grid is that of the
    largest magnitude, which with `slope` gets the gradient of the step.

    Args:
        grad, x: contiguous, of one shape and type.
        slope: whether the scale has a gradient; else 0 is returned.
    """
    total: float | Tensor = 0.0
    if scale is None:
        y = dynamic_fake_quant(x, qmin, qmax, None)
        if slope:
            grad.copy_(dynamic_fake_quant_backward(grad, x, qmin, qmax, None))
        return y, total
    y = fake_quant(x, scale, qmin, qmax, None)
    if slope:
        of_x, total = learned_fake_quant_backward(grad, x, scale, qmin, qmax, None)
    else:
        of_x = fake_quant_backward(grad, x, scale, qmin, qmax, None)
    grad.copy_(of_x)
    return y, total


def _along(axis: int | None, scale: Tensor, x: Tensor) -> Tensor:
    if axis is None:
        return scale.reshape(())
    return scale.reshape([-1 if dim == axis else 1 for dim in range(x.dim())])
