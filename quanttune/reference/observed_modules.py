"""LayerNorm and activations that observe their input and their output, in plain PyTorch.

The definition, and the fallback, of ops whose Triton kernels do all of it in one pass. `kernels` is
the module whose outlier statistics they take: on CPU those of C++.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .. import reference
from . import result_dtype

_aten = torch.ops.aten

# what an activation does, and its gradient
_ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "relu": (functional.relu, partial(_aten.threshold_backward, threshold=0)),
    "gelu": (functional.gelu, _aten.gelu_backward),
    "gelu_tanh": (
        partial(functional.gelu, approximate="tanh"),
        partial(_aten.gelu_backward, approximate="tanh"),
    ),
}
KINDS = tuple(_ACTIVATIONS)


def observed_layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    samples: int,
    exact: bool,
    kernels: Any = reference,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return LayerNorm of x over its last dimension, the mean and 1 / deviation of each token, and
    the outlier statistics of x and of y.

    x is viewed as (samples, -1). All is computed in float32, for float64 in that; y is rounded once
    to the type of x, and observed like that. Mean and 1 / deviation have the shape x.shape[:-1].
    """
    y, mean, rstd = _normalize(x, weight, bias, eps)
    y = y.to(x.dtype)
    input_statistics, output_statistics = (
        kernels.outlier_statistics(tensor, samples, exact) for tensor in (x, y)
    )
    return y, mean.view(x.shape[:-1]), rstd.view(x.shape[:-1]), input_statistics, output_statistics


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
    kernels: Any = reference,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight and bias, where the loss has the terms
    sum(input_ratio_grad * r(x)) and sum(output_ratio_grad * r(y)) beside `grad`, that of y.

    They are rounded once. The gradient of a weight or bias that is None is empty.
    """
    y, _, _ = _normalize(x, weight, bias, eps)
    wide_x, wide_y = _widen(x, x), _widen(y.to(x.dtype), x)
    total = kernels.outlier_statistics_backward(
        _widen(grad, x), wide_y, output_statistics, output_ratio_grad, exact, detach_deviation
    )
    parameters = weight, bias
    total, *gradients = _aten.native_layer_norm_backward(
        total,
        wide_x,
        x.shape[-1:],
        mean.unsqueeze(-1),
        rstd.unsqueeze(-1),
        *(None if parameter is None else _widen(parameter, x) for parameter in parameters),
        [True, weight is not None, bias is not None],
    )
    total = kernels.outlier_statistics_backward(
        total, wide_x, input_statistics, input_ratio_grad, exact, detach_deviation
    )
    weight_grad, bias_grad = (
        x.new_empty(0) if parameter is None else gradient.to(parameter.dtype)
        for parameter, gradient in zip(parameters, gradients, strict=True)
    )
    return total.to(x.dtype), weight_grad, bias_grad


def observed_activation(
    x: Tensor, kind: str, samples: int, exact: bool, kernels: Any = reference
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the activation of x, one of KINDS, and the outlier statistics of x and of y.

    It is computed in float32, for float64 in that; y is rounded once, and observed like that.
    """
    y = _ACTIVATIONS[kind][0](_widen(x, x)).to(x.dtype)
    input_statistics, output_statistics = (
        kernels.outlier_statistics(tensor, samples, exact) for tensor in (x, y)
    )
    return y, input_statistics, output_statistics


def observed_activation_backward(
    grad: Tensor,
    x: Tensor,
    kind: str,
    input_statistics: Tensor,
    output_statistics: Tensor,
    input_ratio_grad: Tensor,
    output_ratio_grad: Tensor,
    exact: bool,
    detach_deviation: bool,
    kernels: Any = reference,
) -> Tensor:
    """Return the gradient of x: see `observed_layer_norm_backward`."""
    activate, activate_backward = _ACTIVATIONS[kind]
    wide_x = _widen(x, x)
    wide_y = _widen(activate(wide_x).to(x.dtype), x)
    total = kernels.outlier_statistics_backward(
        _widen(grad, x), wide_y, output_statistics, output_ratio_grad, exact, detach_deviation
    )
    total = kernels.outlier_statistics_backward(
        activate_backward(total, wide_x),
        wide_x,
        input_statistics,
        input_ratio_grad,
        exact,
        detach_deviation,
    )
    return total.to(x.dtype)


def _normalize(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    weight, bias = (None if p is None else _widen(p, x) for p in (weight, bias))
    return torch.native_layer_norm(_widen(x, x), x.shape[-1:], weight, bias, eps)


def _widen(tensor: Tensor, x: Tensor) -> Tensor:
    return tensor.to(result_dtype(x))
