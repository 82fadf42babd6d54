"""Outlier-driven tuning as a training task of timm."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from timm.task import ClassificationTask
from torch import Tensor, nn

from ..tuning.attach import attach
from .common import plan

if TYPE_CHECKING:
    from timm.task import TrainingTask as _AnyTask
else:
    _AnyTask = object


class QuantTuneTaskMixin(_AnyTask):
    """Add the outlier loss to a task: `class Mine(QuantTuneTaskMixin, LogitDistillationTask)`.

    Its trainable module is attached from the start until `task.tuner.detach()`. While it trains,
    `loss` is the mixed one, of which `loss_task` and `loss_out` are the two terms (eq. 3). Call
    `task.tuner.step()` after each step of the optimizer. The steps, and what balance="initial"
    found, are in the task's state, which timm keeps in its checkpoints, so a resumed training goes
    on where it was. `compile` costs the first step one forward more.

    Args:
        tuning: arguments of `quanttune.attach` other than the model; `total_steps` among them
            unless alpha is constant.
        All others: see the task.
    """

    trainable_module: nn.Module

    def __init__(self, *args: Any, tuning: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.tuner = attach(self.trainable_module, **(tuning or {}))

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Return what the task does, in training mode with the mixed loss."""
        tuner, forward = self.tuner, super().forward
        if not tuner.model.training:
            return forward(input, target)
        plan(tuner, self.trainable_module, lambda: forward(input, target)["loss"])
        result = forward(input, target)
        result["loss"] = tuner.combine(result["loss"])
        if tuner.task_loss is not None and tuner.outlier_loss is not None:
            result |= {"loss_task": tuner.task_loss, "loss_out": tuner.outlier_loss}
        return result

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """Return the state of the task and, but for that of the average, of the tuner."""
        state = super().get_task_state(module, ema)
        if ema:
            return state
        tuner = {"steps": self.tuner.steps, "balance_factor": self.tuner.balance_factor}
        return {**state, "tuner": tuner}

    def load_task_state(
        self,
        state: dict[str, Any] | None,
        strict: bool = True,
        module: nn.Module | None = None,
        ema: bool = False,
    ) -> None:
        """Go on where a checkpoint was made, if it was by a task that tunes."""
        super().load_task_state(state, strict, module, ema)
        tuner = (state or {}).get("tuner")
        if tuner is None:
            return
        self.tuner.resume(tuner["steps"])
        if tuner["balance_factor"] is not None:
            device = next(self.tuner.model.parameters()).device
            self.tuner.balance_factor = tuner["balance_factor"].to(device)


class QuantTuneTask(QuantTuneTaskMixin, ClassificationTask):
    """A ClassificationTask of timm that tunes for quantization. See `QuantTuneTaskMixin`."""
