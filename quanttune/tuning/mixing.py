"""The outlier loss (eq. 2), and its sum with the task's (eq. 3)."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.autograd.function import once_differentiable

from ..losses import OutlierLoss
from .loss_weight import Upstream
from .observation import Observation


def outlier_loss(
    observations: list[Observation], loss: OutlierLoss, device: torch.device
) -> Tensor:
    """Return L_out = mean over instances and samples of the ratio (eq. 2), without a graph."""
    groups: dict[tuple[int, torch.Size, torch.device], list[Tensor]] = defaultdict(list)
    for observation in observations:
        statistics = observation.statistics
        assert statistics is not None
        groups[observation.multiplicity, statistics.shape, statistics.device].append(statistics)
    # few sums of stacks instead of a small operation per tensor
    sums = [
        multiplicity * len(group) * loss.values(torch.stack(group)).mean().to(device)
        for (multiplicity, _, _), group in groups.items()
    ]
    return torch.stack(sums).sum() / instances(observations)


def instances(observations: list[Observation]) -> int:
    """Return n of eq. 2: a tensor that two modules see counts twice."""
    return sum(observation.multiplicity for observation in observations)


class _Combine(torch.autograd.Function):
    """Eq. 3. Its backward runs before that of any observed tensor, and tells them their weight."""

    @staticmethod
    def forward(
        ctx: Any,
        task: Tensor,
        outlier: Tensor,
        task_weight: float,
        outlier_weight: Tensor,
        upstream: Upstream,
        count: int,
        on_end_backward: Callable[[], None] | None,
    ) -> Tensor:
        ctx.weights = task_weight, outlier_weight, upstream, count
        ctx.on_end_backward = on_end_backward
        return task_weight * task + outlier_weight * outlier

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        task_weight, outlier_weight, upstream, count = ctx.weights
        upstream.publish(grad * outlier_weight / count)
        # a later backward that has nothing to do with the tuner must find no weight
        Variable._execution_engine.queue_callback(upstream.clear)
        if ctx.on_end_backward:
            Variable._execution_engine.queue_callback(ctx.on_end_backward)
        return grad * task_weight, None, None, None, None, None, None


def combine(
    task: Tensor,
    outlier: Tensor,
    task_weight: float,
    outlier_weight: Tensor,
    upstream: Upstream,
    count: int,
    on_end_backward: Callable[[], None] | None = None,
) -> Tensor:
    """Return the weighted sum of two losses, whose backward tells the taps their weight."""
    arguments = task_weight, outlier_weight, upstream, count, on_end_backward
    return _Combine.apply(task, outlier, *arguments)
