"""The arguments of transformers' Trainer that follow from the settings of a run."""

from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path

import torch
from transformers import HfArgumentParser, TrainingArguments

from .settings import Settings

# these have an option of their own
_OPTIONS = {
    "output_dir": "--out",
    "max_steps": "--steps",
    "num_train_epochs": "--steps",
    "per_device_train_batch_size": "--batch-size",
    "learning_rate": "--learning-rate",
    "save_steps": "--save-steps",
    "seed": "--seed",
    "resume_from_checkpoint": "--resume",
}


def training_arguments(settings: Settings, folder: Path) -> TrainingArguments:
    """Return the Trainer's arguments: those of the settings, ours, and `settings.trainer`.

    Raises:
        ValueError: an unknown field, one that has an option of its own, or one that would leave
            nothing to resume from.
    """
    for key in settings.trainer:
        _check(key)
    values = {
        "output_dir": folder,
        "max_steps": settings.steps,
        "per_device_train_batch_size": settings.batch_size,
        "learning_rate": settings.learning_rate,
        "save_steps": settings.save_steps,
        "seed": settings.seed,
        "logging_steps": 1,
        "save_total_limit": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not torch.accelerator.is_available(),  # bf16 wants it said
        "remove_unused_columns": False,  # images become pixels when a batch is taken
        "dataloader_pin_memory": torch.cuda.is_available(),
        **settings.trainer,
    }
    flags = [f"--{key}={value}" for key, value in values.items()]
    (arguments,) = _Parser(TrainingArguments).parse_args_into_dataclasses(
        flags, look_for_args_file=False
    )
    if arguments.save_only_model:
        raise ValueError("save_only_model=true leaves out what --resume needs: leave it out")
    if arguments.save_total_limit == 1:
        raise ValueError(
            "save_total_limit must be 2 or more, got 1: a kill while the only checkpoint is "
            "replaced would leave none"
        )
    return arguments


class _Parser(HfArgumentParser):
    def error(self, message: str) -> None:
        raise ValueError(f"--trainer: {message}")


def _check(key: str) -> None:
    if key in _OPTIONS:
        raise ValueError(f"--trainer {key}=... has an option of its own: {_OPTIONS[key]}")
    known = [f.name for f in fields(TrainingArguments) if f.init]
    if key not in known:
        close = get_close_matches(key, known)
        hint = f": did you mean {' or '.join(close)}?" if close else ""
        raise ValueError(f"TrainingArguments of transformers have no field {key!r}{hint}")
