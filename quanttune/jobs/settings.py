"""What a run is asked for: which model, which data, and how it is tuned."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Settings:
    """Everything that decides which weights a run ends with, but for the data's content.

    Args:
        model: a folder, a Hugging Face id or a name that timm knows.
        data: a folder, a file (csv, tsv, json, jsonl, parquet, txt) or the name of a dataset.
        task: text-classification, text-generation, text2text-generation (an encoder and a decoder)
            or image-classification; by default that of the model's architecture.
        subset, split: of the dataset; without a split its validation rows, or the only ones.
        text, label: columns; by default those that their types tell. For text2text-generation the
            label is the text to be written, by default the second of two.
        tokens: longest row of tokens; for text-generation the length of every row.
        refit_rows: how many rows, drawn by the seed, it is refitted to before the first step.
        steps, save_steps: of the optimizer.
        lora_rank: of the adapters that are trained in place of the model; 0 trains the model.
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
    refit_rows: int = 0
    steps: int = 1000
    batch_size: int = 32
    learning_rate: float = 2e-5
    save_steps: int = 100
    seed: int = 0
    lora_rank: int = 0
    tuning: Mapping[str, Any] = field(default_factory=dict)
    trainer: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("tokens", "steps", "batch_size", "save_steps"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} must be 1 or more, got {value}")
        for name in ("refit_rows", "lora_rank"):
            if (value := getattr(self, name)) < 0:
                raise ValueError(f"{name} must be 0 or more, got {value}")
        if self.lora_rank and self.refit_rows:
            raise ValueError(
                "a refit changes weights that checkpoints of adapters do not hold: `quanttune "
                "refit` first, then tune the folder that it writes with --lora-rank"
            )

    def as_json(self) -> dict[str, Any]:
        """Return what a JSON file gives back."""
        data: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return data
