"""A product of a rounded tensor that keeps, for its backward, what a float product keeps."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# a function of autograd that rounds a tensor, and what it takes beside it
Rounding = tuple[Any, tuple[Any, ...]]


def rounded_linear(x: Tensor, weight: Tensor, bias: Tensor | None, rounding: Rounding) -> Tensor:
    """Multiply a rounded x with a weight, as F.linear does.

    Backward rounds x once more, while it masks the gradient: that takes no longer than to write and
    read a copy that is kept, and no memory when it is over.
    """
    function, (first, *others) = rounding
    with torch._C.DisableTorchFunction():  # the module that calls has rounded what is to be
        y: Tensor = _RoundedLinear.apply(x, first, weight, bias, function, others)
    return y


class _Nothing:
    """Keeps nothing for a backward, in the place of autograd's context."""

    def save_for_backward(self, *tensors: Tensor) -> None:
        pass


class _RoundedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        first: Any,
        weight: Tensor,
        bias: Tensor | None,
        function: Any,
        others: list[Any],
    ) -> Tensor:
        is_scale = isinstance(first, Tensor)
        ctx.save_for_backward(x, weight, first if is_scale else None)
        ctx.rounding = function, None if is_scale else first, others
        return F.linear(function.forward(_Nothing(), x, first, *others), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        function, first, others = ctx.rounding
        arguments = x, first if scale is None else scale, *others
        rows = grad.reshape(-1, grad.shape[-1])
        of_x = of_scale = of_weight = of_bias = None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            of_x = (rows @ weight.to(grad.dtype)).view(x.shape).to(x.dtype)
            rounded, of_scale = function.again(of_x, *arguments)
        else:
            rounded = function.forward(_Nothing(), *arguments)
        if ctx.needs_input_grad[2]:
            inputs = rounded.reshape(-1, x.shape[-1]).to(grad.dtype)
            of_weight = (rows.t() @ inputs).to(weight.dtype)
        if ctx.needs_input_grad[3]:
            of_bias = rows.sum(0)
        return of_x, of_scale, of_weight, of_bias, None, None
