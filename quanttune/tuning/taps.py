"""What an observed tensor passes through."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import ops
from ..losses import OutlierLoss
from .loss_weight import traced_ratio_grad
from .observation import Context, Observation


class Tap(torch.autograd.Function):
    """Observe x on its way. When its backward runs, the loss has told what an instance weighs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, observation: Observation, context: Context) -> Tensor:
        ctx.save_for_backward(x)
        ctx.observation, ctx.context = observation, context
        # not saved by autograd, which may copy it elsewhere before the statistics are there
        observation.statistics = context.loss.measure(
            context.kernels, x, observation.samples, observation.ranges
        )
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        observation, context = ctx.observation, ctx.context
        statistics = observation.statistics
        observation.awaits_gradient = False
        ratio_grad = context.upstream.ratio_grad(observation.multiplicity, statistics)
        total = context.loss.backward(ops, grad, x, statistics, ratio_grad, observation.ranges)
        return total, None, None


# what hands a tensor on as it is, in another type or shape
_PASSING = {
    "ToCopyBackward0", "CloneBackward0", "AliasBackward0", "ViewBackward0", "UnsafeViewBackward0",
    "ReshapeAliasBackward0", "SqueezeBackward0", "SqueezeBackward1", "UnsqueezeBackward0",
    "ViewAsBackward0",
}  # fmt: skip


def observation_behind(output: Tensor) -> Observation | None:
    """Return the observation of a tap's result, also of one that was handed on since.

    accelerate and FSDP2 cast what a model returns; DeepSpeed's ZeRO-3 passes it through autograd
    functions of its own, which count if the values are still the same.
    """
    node, custom = output.grad_fn, False
    while node is not None and not hasattr(node, "observation"):
        is_custom = isinstance(node, torch.autograd.function.BackwardCFunction)
        before = [function for function, _ in node.next_functions if function is not None]
        if len(before) != 1 or not (is_custom or node.name() in _PASSING):
            return None
        node, custom = before[0], custom or is_custom
    observation: Observation | None = getattr(node, "observation", None)
    if observation is None or not custom:
        return observation
    (x,) = node.saved_tensors  # type: ignore[union-attr]
    same = x.numel() == output.numel() and torch.equal(
        x.to(output.dtype).flatten(), output.flatten()
    )
    return observation if same else None


class PlannedTap(torch.autograd.Function):
    """A tap that torch.compile can trace: all it needs is known beforehand."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        coefficient: Tensor,
        samples: int,
        multiplicity: int,
        loss: OutlierLoss,
        ranges: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        statistics = loss.measure(ops, x, samples, ranges)
        ctx.save_for_backward(x, statistics, coefficient, ranges)
        ctx.constants = multiplicity, loss
        ctx.mark_non_differentiable(statistics)
        return x.view_as(x), statistics

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x, statistics, coefficient, ranges = ctx.saved_tensors
        multiplicity, loss = ctx.constants
        ratio_grad = traced_ratio_grad(coefficient, grad, len(statistics), multiplicity)
        total = loss.backward(ops, grad, x, statistics, ratio_grad, ranges)
        return total, *[None] * 5
