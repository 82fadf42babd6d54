"""Measure a model on a dataset, in float and quantized. What `quanttune evaluate` does."""

import time
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from ..progress import Progress, silent, track
from ..quantization.methods import roundings_in
from ..quantization.running import in_float
from ..quantization.saving.description import describe
from .dataset import load_dataset
from .metrics import LAST_WORDS, choose, measure
from .models import ModelSource, find_model
from .settings import Settings


def evaluate(
    settings: Settings,
    *,
    metrics: Sequence[str] = (),
    limit: int | None = None,
    say: Callable[[str], None] = print,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Measure a model on a dataset; a quantized one beside its own weights in float.

    By default the metric is the accuracy, for the subsets cola, mrpc and qqp that of GLUE, and for
    text generation the perplexity of rows of `settings.tokens` tokens, each but the first of a row
    predicted from those before it. "float" is None where a method rounded the weights.

    Args:
        metrics: accuracy, f1 (of the model's class 1) and matthews_correlation of classification;
            perplexity of generation, or last_word and last_token: how often every token of a
            text's last word, or its last one, is the likeliest after those before it. Texts are
            not joined then, and lose their beginning beyond `settings.tokens`. exact_match, bleu
            (sacreBLEU's) and word_error_rate of what an encoder's decoder writes, the likeliest
            token each. In per cent, but for perplexity.
        limit: rows to measure, drawn by the seed; for perplexity texts, before they are cut.

    Raises:
        ValueError: an argument or the data do not fit; it says what would.
    """
    began = time.monotonic()
    source = find_model(settings)
    names = choose(source.task, settings.subset, metrics, getattr(source.config, "num_labels", 0))
    inputs = load_dataset(settings, limit=limit, last_words=names[0] in LAST_WORDS)
    for line in inputs.said:
        say(line)

    def measured(name: str, model: nn.Module) -> dict[str, float]:
        batches = inputs.batches(settings, model)
        rows = track(batches, f"measuring {name}", progress)
        return measure(names, model, rows, inputs.processor)

    return {
        "task": inputs.task,
        "rows": len(inputs.rows),
        **beside(inputs, settings.seed, measured),
        **inputs.facts,
        "seconds": round(time.monotonic() - began, 1),
    }


def beside(
    source: ModelSource, seed: int, measured: Callable[[str, nn.Module], dict[str, Any]]
) -> dict[str, Any]:
    """Return what is measured of a model in float and, if it is quantized, beside it as it is.

    Where a method rounded the weights, "float" is None.
    """
    model = source.load(seed)
    if not source.is_quantized:
        return {"float": measured("float", model), "quantized": None, "quantization": None}
    exact, scheme = None, describe(model)["scheme"]
    if not roundings_in(scheme["methods"]):
        with in_float(model):
            exact = measured("float", model)
    return {"float": exact, "quantized": measured("quantized", model), "quantization": scheme}
