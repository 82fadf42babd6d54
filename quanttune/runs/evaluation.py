"""Measure a model on a dataset, in float and quantized. What `quanttune evaluate` does."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..quantization.description import describe
from .inputs import Progress, prepare, silent
from .settings import Settings


def evaluate(
    settings: Settings,
    *,
    limit: int | None = None,
    say: Callable[[str], None] = print,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Measure a model on a dataset; a quantized one beside its own weights in float.

    The metric is the accuracy in per cent, or for text generation the perplexity of rows of
    `settings.tokens` tokens, each but the first of a row predicted from those before it.

    Args:
        limit: rows to measure, drawn by the seed; for generation texts, before they are cut.

    Raises:
        ValueError: an argument or the data do not fit; it says what would.
    """
    began = time.monotonic()
    inputs = prepare(settings, limit=limit)
    for line in inputs.said:
        say(line)
    results: dict[str, Any] = {"float": None, "quantized": None, "quantization": None}
    quantized = getattr(inputs.config, "quantization_config", None)
    for name in ("float", *(["quantized"] if quantized else [])):
        model = inputs.load(settings.seed, quantized=name == "quantized")
        batches = inputs.batches(settings, model, f"measuring {name}", progress)
        results[name] = _METRICS[inputs.task][1](model, batches)
    if quantized:
        results["quantization"] = describe(model)["scheme"]
    return {
        "task": inputs.task,
        "metric": _METRICS[inputs.task][0],
        "rows": len(inputs.rows),
        **results,
        **inputs.facts,
        "seconds": round(time.monotonic() - began, 1),
    }


@torch.no_grad()
def accuracy(model: nn.Module, batches: Iterator[dict[str, Tensor]]) -> float:
    """Return how many per cent of the rows get their label."""
    right, rows = 0, 0
    for batch in batches:
        labels = batch.pop("labels")
        right += int((model(**batch).logits.argmax(-1) == labels).sum())
        rows += len(labels)
    return 100 * right / rows


@torch.no_grad()
def perplexity(model: nn.Module, batches: Iterator[dict[str, Tensor]]) -> float:
    """Return exp of the mean negative log-likelihood of each token but the first of a row."""
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for batch in batches:
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch).logits[:, :-1].float()
        total += F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").cpu()
        tokens += labels.numel()
    return (total / tokens).exp().item()


_METRICS = {
    "text-classification": ("accuracy", accuracy),
    "image-classification": ("accuracy", accuracy),
    "text-generation": ("perplexity", perplexity),
}
