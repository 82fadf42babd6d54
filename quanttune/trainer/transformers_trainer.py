"""Outlier-driven tuning with the Trainer of transformers."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from ..reference import result_dtype
from ..tuning.attach import attach
from ..tuning.tuner import Tuner
from . import common
from .checkpoint import has_weights, load_weights

# Their loss is the mean over a micro-batch, though they take **kwargs, from which Trainer concludes
# that it is normalized over all micro-batches of a step (transformers#47688).
_MEAN_LOSS = {
    *MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values(),
    *MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.values(),
}

_STATE = "quanttune"  # the key in trainer_state.json, beside those of stateful callbacks

if TYPE_CHECKING:
    from transformers import Trainer as _AnyTrainer
else:
    _AnyTrainer = object


class QuantTuneMixin(_AnyTrainer):
    """Add the outlier loss to a Trainer: `class Mine(QuantTuneMixin, Seq2SeqTrainer)`.

    The model is attached while it trains. The weight alpha follows the global step, and what
    balance="initial" found is kept in trainer_state.json, so a resumed training goes on where it
    was. With more steps than before, the learning rate and alpha go on as if there had been so many
    from the start. A model that is compiled gets the first batch twice.

    A checkpoint that is resumed, or the best one at the end, is loaded whatever names transformers
    saved it under, and refused where they are not all those of the model. (Those of FSDP, DeepSpeed
    and PEFT are loaded as Trainer does it.)

    What `log` reports gets `loss_task` and `loss_out`, the two terms of eq. 3 at the last
    micro-batch, the `alpha` of the next step and, if it is reported to a service such as
    TensorBoard, as `range/<site>` the largest magnitude there.

    Under gradient accumulation both terms are means over all micro-batches of a step. For sequence
    and image classification `loss_is_scaled_for_ga` becomes False, unless the class sets it:
    without that Trainer would sum up their losses (transformers#47688).

    Args:
        tuning: arguments of `quanttune.attach` other than the model and `total_steps`.
        All others: see the Trainer.

    Raises:
        ValueError: more than one GPU in one process (DataParallel copies the model without its
            hooks).
    """

    tuner: Tuner | None = None
    loss_is_scaled_for_ga: bool | None  # of the Trainer

    def __init__(self, *args: Any, tuning: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.args.n_gpu > 1:
            raise ValueError(
                f"{self.args.n_gpu} GPUs in one process make a DataParallel, whose copies of the "
                "model are not observed: start one process per GPU with torchrun"
            )
        plain = getattr(self.model, "get_base_model", lambda: self.model)()  # in a PeftModel
        if self.loss_is_scaled_for_ga is None and type(plain).__name__ in _MEAN_LOSS:
            self.loss_is_scaled_for_ga = False
        self.tuning = dict(tuning or {})
        self.add_callback(_Schedule(self))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, and leave nothing on the model, however it ends."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self.detach()

    def detach(self) -> None:
        """Take the tuner off the model, if it has one."""
        if self.tuner:
            self.tuner.detach()
            self.tuner = None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the loss of the Trainer, in training mode mixed with the outlier loss (eq. 3)."""
        compute = super().compute_loss
        if self.loss_is_scaled_for_ga is False:
            num_items_in_batch = None  # with it, Trainer multiplies a mean by the processes
        if not (self.tuner and model.training):
            return compute(model, inputs, return_outputs, num_items_in_batch)
        # where the loss is a share of the step's, the outlier loss has to be one too
        parts = 1
        if self._is_share(num_items_in_batch):
            parts = self.current_gradient_accumulation_steps
        common.plan(
            self.tuner,
            model,
            lambda: compute(model, dict(inputs), False, num_items_in_batch) * parts,
        )
        loss, outputs = compute(model, inputs, True, num_items_in_batch)
        loss = self.tuner.combine(loss * parts) / parts
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Report the terms of eq. 3 and the ranges with the training loss."""
        if "loss" in logs and self.tuner:
            logs |= common.logs(self.tuner, ranges=bool(self.args.report_to))
        super().log(logs, *args, **kwargs)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        if not self._load(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if not self._load(self.state.best_model_checkpoint):
            super()._load_best_model()

    def _load(self, checkpoint: str) -> bool:
        """Load the weights of a checkpoint, if they are those of a whole model in one process."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or not has_weights(Path(checkpoint)):
            return False
        unwrapped = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        load_weights(unwrapped, Path(checkpoint))
        return True

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        schedule = self.lr_scheduler
        if checkpoint and isinstance(schedule, LambdaLR):
            # what was loaded is the next step's rate of the old schedule: 0 where that had ended
            rates = [
                rate * factor(schedule.last_epoch)
                for rate, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
            ]
            schedule.load_state_dict({**schedule.state_dict(), "_last_lr": rates})
            for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate

    def _is_share(self, num_items_in_batch: Tensor | int | None) -> bool:
        """Tell, as Trainer.training_step does, whether it will not divide the loss."""
        if self.loss_is_scaled_for_ga is not None:
            return self.loss_is_scaled_for_ga
        normalized = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return normalized or self.compute_loss_func is not None


class QuantTuneTrainer(QuantTuneMixin, Trainer):
    """A Trainer that tunes for quantization. See `QuantTuneMixin`."""


class _Schedule(TrainerCallback):
    """Attaches the model while it trains, counts the optimizer's steps, and keeps the balance.

    Not an ExportableState: on resuming, that is made anew of what JSON can hold.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        self.trainer.tuner = attach(model, total_steps=state.max_steps, **self.trainer.tuning)
        self.trainer.tuner.resume(state.global_step)
        if _STATE in state.stateful_callbacks:
            like = next(model.parameters())
            self.trainer.tuner.balance_factor = torch.tensor(
                state.stateful_callbacks[_STATE]["balance_factor"],
                device=like.device,
                dtype=result_dtype(like),
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        tuner = self.trainer.tuner
        tuner.resume(state.global_step)
        if tuner.balance_factor is not None and _STATE not in state.stateful_callbacks:
            state.stateful_callbacks[_STATE] = {"balance_factor": tuner.balance_factor.item()}
