"""Observe an activation's outliers while it passes through: one read forward, one pass backward.

`quanttune.reference` has the same names in plain PyTorch; the numbers are the same.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import ops, reference
from .reference import RATIO, Statistics, rows_of


class _Observe(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, samples: int, exact: bool, detach_deviation: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        statistics = ops.outlier_statistics(x, samples, exact)
        ctx.save_for_backward(x, statistics)
        ctx.options = exact, detach_deviation
        ctx.mark_non_differentiable(statistics)
        return x.view_as(x), statistics, statistics[:, RATIO].clone()

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: Tensor, _: Tensor, ratio_grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, statistics = ctx.saved_tensors
        total = ops.outlier_statistics_backward(grad, x, statistics, ratio_grad, *ctx.options)
        return total, None, None, None


def observe(
    x: Tensor,
    samples: int | None = None,
    *,
    exact: bool = False,
    detach_deviation: bool = False,
) -> tuple[Tensor, Statistics]:
    """Return x and the outlier statistics of each of its samples.

    Use the returned x in place of the given one: the gradient of the ratio joins that of x in one
    pass. It shares storage with x, and changing either in place is an error.

    Args:
        x: activations of any shape, batch-major: viewed as (samples, N). A copy is made if x is
            strided.
        samples: how many samples x holds; by default its first dimension.
        exact: take the median of all elements, not of a sample, where N exceeds 65,536.
        detach_deviation: hold the deviation constant in the gradient. With the paper's loss a huge
            outlier hardly feels a gradient, since it makes most of the deviation itself.

    Returns:
        x, and `Statistics` of float32 tensors (float64 for float64) of shape (samples,); only
        `ratio` has a gradient. A sample that holds NaN or inf has NaN statistics, a constant one
        the ratio 0.

    Raises:
        TypeError: x is not floating point. ValueError: the samples do not divide x.

    Source: QuantTune, arXiv 2403.06497, eq. 2. The sampled median and the options are ours.
    """
    samples = rows_of(x, samples)
    x, statistics, ratio = _Observe.apply(x, samples, exact, detach_deviation)
    return x, Statistics._make((*statistics[:, :RATIO].unbind(1), ratio))


def outlier_ratio(
    x: Tensor,
    samples: int | None = None,
    *,
    exact: bool = False,
    detach_deviation: bool = False,
) -> Tensor:
    """Return (max|A| - median|A|) / deviation(A) of each sample: a term of eq. 2. See `observe`."""
    return observe(x, samples, exact=exact, detach_deviation=detach_deviation)[1].ratio


class FusedObserver(reference.FusedObserver):
    """Pass x through and keep the ratio of each of its samples in `ratio`, with fused kernels.

    Put it wherever a model's activations are to be observed, and add `observer.ratio.mean()`, times
    a weight, to the loss. `ratio` is None after a forward in evaluation mode or under no_grad,
    which observes nothing. `quanttune.attach` does all of this for every Linear and LayerNorm.

    Args: see `observe`.
    """

    _observe = staticmethod(observe)
