"""What every trainer does with a tuner."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule

from ..tuning.tuner import Tuner


def logs(tuner: Tuner, ranges: bool = True) -> dict[str, float]:
    """Return what a logger is told: alpha, the terms of eq. 3 and the largest magnitudes.

    Those are called `range/<site>`; there are too many of them for a terminal.
    """
    terms = {"loss_task": tuner.task_loss, "loss_out": tuner.outlier_loss}
    told = {"alpha": tuner.alpha}
    told |= {name: term.item() for name, term in terms.items() if term is not None}
    if ranges:
        told |= {f"range/{site}": value for site, value in tuner.ranges().items()}
    return told


def plan(tuner: Tuner, model: nn.Module, task_loss: Callable[[], Tensor]) -> None:
    """Let the tuner see, once, the forward of a model that torch.compile is to trace.

    It draws no random number, but the first batch goes through `task_loss` twice.
    """
    if tuner.is_planned or not any(isinstance(m, OptimizedModule) for m in model.modules()):
        return
    with torch.random.fork_rng(), torch.compiler.set_stance("force_eager"):
        tuner.combine(task_loss())
