"""What is tuned, on what and how; and the arguments of the Trainer that follow from it."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from transformers import HfArgumentParser, TrainingArguments

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


@dataclass(frozen=True)
class Settings:
    """Everything that decides which weights a run ends with, but for the data's content.

    Args:
        model: a folder, a Hugging Face id or a name that timm knows.
        data: a folder, a file (csv, tsv, json, jsonl, parquet, txt) or the name of a dataset.
        task: text-classification, text-generation or image-classification; by default that of the
            model's architecture.
        subset, split: of the dataset; without a split its validation rows, or the only ones.
        text, label: columns; by default those that their types tell.
        tokens: longest row of tokens for classification; length of every row for generation.
        steps, save_steps: of the optimizer.
        tuning: arguments of `quanttune.attach` other than `total_steps`.
        trainer: any other field of transformers' TrainingArguments, as text.
    """

    model: str
    data: str
    task: str | None = None
    subset: str | None = None
    split: str | None = "train"
    text: tuple[str, ...] = ()
    label: str | None = None
    tokens: int = 128
    steps: int = 1000
    batch_size: int = 32
    learning_rate: float = 2e-5
    save_steps: int = 100
    seed: int = 0
    tuning: Mapping[str, Any] = field(default_factory=dict)
    trainer: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("tokens", "steps", "batch_size", "save_steps"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} must be 1 or more, got {value}")

    def as_json(self) -> dict[str, Any]:
        """Return what a JSON file gives back."""
        data: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return data


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
