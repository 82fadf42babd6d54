"""What a run writes down while it trains."""

from collections.abc import Callable
from typing import Any

from accelerate import PartialState
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import CONFIG_NAME

from . import checkpoints
from .run_folder import RunFolder


class Recorder(TrainerCallback):
    """Appends to metrics.jsonl, marks whole checkpoints, tells the progress: in one process."""

    def __init__(self, folder: RunFolder, progress: Callable[[int, float], None]) -> None:
        self.folder, self.progress = folder, progress
        self.loss = float("nan")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if state.is_world_process_zero:
            self.progress(state.global_step, self.loss)  # which may end the run

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        log = state.log_history[-1]
        if (
            state.is_world_process_zero and "train_runtime" not in log
        ):  # the sum at the end, of this process alone
            self.folder.append(log)
            self.loss = log.get("loss", self.loss)

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **_: Any,
    ) -> None:
        PartialState().wait_for_everyone()  # each process has written files of its own
        if not state.is_world_process_zero:
            return
        checkpoint = self.folder.path / f"checkpoint-{state.global_step}"
        if not (checkpoint / CONFIG_NAME).exists():  # of adapters alone
            model.config.save_pretrained(checkpoint)
        checkpoints.mark(checkpoint)
