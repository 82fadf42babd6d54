"""What a run writes down while it trains, and what it needs to go on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from . import checkpoints
from .folder import RunFolder


class Recorder(TrainerCallback):
    """Appends to metrics.jsonl, marks whole checkpoints, tells the progress.

    The factor of balance="initial" comes from the first step, so it is kept with the mark.
    """

    def __init__(
        self,
        trainer: Any,
        folder: RunFolder,
        checkpoint: Path | None,
        progress: Callable[[int, float], None],
    ) -> None:
        self.trainer, self.folder, self.progress = trainer, folder, progress
        self.factor = checkpoints.notes(checkpoint)["balance_factor"] if checkpoint else None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self.factor is not None:
            self.trainer.tuner.balance_factor = torch.tensor(self.factor, device=args.device)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        log = state.log_history[-1]
        if "train_runtime" not in log:  # the sum at the end, of this process alone
            self.folder.append(log)
            self.progress(state.global_step, log.get("loss", float("nan")))

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        factor = self.trainer.tuner.balance_factor
        checkpoint = self.folder.path / f"checkpoint-{state.global_step}"
        checkpoints.mark(checkpoint, {"balance_factor": None if factor is None else factor.item()})
