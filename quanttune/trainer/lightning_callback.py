"""Outlier-driven tuning with the Trainer of Lightning."""

from collections.abc import Callable, Mapping
from functools import update_wrapper
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from ..tuning.attach import attach
from ..tuning.sites import observed_types
from ..tuning.tuner import Tuner
from .common import logs, plan


class QuantTuneCallback(Callback):
    """Add the outlier loss to what `training_step` returns, while `fit` trains.

    The weight alpha follows the global step, and checkpoints keep what balance="initial" found, so
    a resumed training goes on where it was. After `fit`, or an exception in it, the model is what
    it was. Where a submodule is compiled, the first batch goes through `training_step` twice.

    Every `log_every_n_steps` the loggers get `loss_task` and `loss_out`, the two terms of eq. 3 at
    the last micro-batch, the `alpha` of the next step and as `range/<site>` the largest magnitude
    there.

    Args:
        tuning: arguments of `quanttune.attach` other than the model; `total_steps` is that of the
            Trainer by default.
        model: name of the submodule that `training_step` calls as a whole, "" for the
            LightningModule itself. By default it is the only child with a Linear or LayerNorm, and
            with several such children the LightningModule.

    Raises:
        ValueError: manual optimization, where `training_step` has to combine the loss itself.
    """

    tuner: Tuner | None = None

    def __init__(self, tuning: Mapping[str, Any] | None = None, model: str | None = None) -> None:
        self.tuning = dict(tuning or {})
        self.model = model
        self._balance_factor: Tensor | None = None  # of the checkpoint that is resumed

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._balance_factor = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not pl_module.automatic_optimization:
            raise ValueError(
                "QuantTuneCallback needs automatic optimization. In manual optimization, call "
                "quanttune.attach in on_fit_start, tuner.combine before manual_backward and "
                "tuner.step after each optimizer.step"
            )
        steps = trainer.estimated_stepping_batches
        known = {"total_steps": int(steps)} if steps < float("inf") else {}
        self.tuner = attach(_called_model(pl_module, self.model), **(known | self.tuning))
        pl_module.training_step = _MixedStep(pl_module, self.tuner)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self.tuner
        self.tuner.resume(trainer.global_step)
        if self._balance_factor is not None:
            self.tuner.balance_factor = self._balance_factor.to(pl_module.device)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert self.tuner
        step, every = trainer.global_step, trainer.log_every_n_steps
        if step == self.tuner.steps:  # a micro-batch before the last
            return
        self.tuner.resume(step)
        if every and step % every == 0:
            told = logs(self.tuner)
            for logger in trainer.loggers:
                logger.log_metrics(told, step - 1)  # Lightning's own are counted from 0

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._detach(pl_module)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._detach(pl_module)

    def state_dict(self) -> dict[str, Any]:
        return {"balance_factor": self.tuner.balance_factor if self.tuner else None}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._balance_factor = state_dict["balance_factor"]

    def _detach(self, pl_module: LightningModule) -> None:
        step = vars(pl_module).get("training_step")
        if isinstance(step, _MixedStep):
            step.undo()
            step.tuner.detach()


class _MixedStep:
    """The training_step of a module, with eq. 3 for its loss. A copy of the module has its own."""

    def __init__(self, module: LightningModule, tuner: Tuner) -> None:
        self.module, self.tuner = module, tuner
        self.own = vars(module).get("training_step")  # that of a module that is compiled
        update_wrapper(self, module.training_step)  # Lightning looks at its arguments

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        step: Callable[..., Any] = self.__wrapped__  # type: ignore[attr-defined]
        plan(self.tuner, self.module, lambda: _loss_in(step(*args, **kwargs)))
        output = step(*args, **kwargs)
        loss = _loss_in(output)
        if loss is None:  # the batch is left out, and so is what was observed
            with torch.no_grad():
                self.tuner.combine(torch.zeros(()))
            return output
        mixed = self.tuner.combine(loss)
        return {**output, "loss": mixed} if isinstance(output, Mapping) else mixed

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self.module, "training_step")

    def undo(self) -> None:
        """Give the module its training_step back."""
        del self.module.training_step
        if self.own:
            self.module.training_step = self.own


def _loss_in(output: Any) -> Any:
    return output.get("loss") if isinstance(output, Mapping) else output


def _called_model(module: LightningModule, name: str | None) -> nn.Module:
    if name is not None:
        return module.get_submodule(name)
    types = observed_types()
    children = [
        child
        for child in module.children()
        if any(isinstance(part, types) for part in child.modules())
    ]
    return children[0] if len(children) == 1 else module
