"""A model and a dataset, to be analysed. What `quanttune analyze --data` looks at."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from ..analysis.subject import Subject
from . import models
from .dataset import Dataset, load_dataset
from .metrics import choose, measure
from .settings import Settings


def load_subject(
    settings: Settings,
    compare: Sequence[str] = (),
    *,
    rows: int = 100,
    limit: int = 400,
    say: Callable[[str], None] = print,
) -> tuple[Subject, dict[str, nn.Module]]:
    """Return a subject, and the models to compare it with, by the names of their folders.

    Quality is the accuracy in per cent, how often an encoder's decoder writes the very label, or
    for text generation the geometric mean of the probability of the next token, which is 100 /
    perplexity.

    Args:
        rows: how many ranges and statistics are taken from; limit: how many others quality is
            measured on. They are drawn by the seed, and halved if the data have fewer.

    Raises:
        ValueError: an argument or the data do not fit; it says what would.
    """
    inputs = load_dataset(settings, limit=rows + limit)
    for line in inputs.said:
        say(line)
    taken = min(rows, len(inputs.rows) // 2)
    if not taken:
        raise ValueError(f"{settings.data} makes {len(inputs.rows)} row(s): two are needed")
    model = inputs.load(settings.seed)
    watched = _rows(inputs, range(taken))
    data = [
        {name: x for name, x in batch.items() if name != "labels"}
        for batch in watched.batches(settings, model)
    ]
    measured = _rows(inputs, range(taken, len(inputs.rows)))
    is_text = inputs.task == "text-generation"
    metric = "perplexity" if is_text else choose(inputs.task, None, (), 0)[0]

    def evaluate(model: nn.Module) -> float:
        batches = measured.batches(settings, model)
        (value,) = measure([metric], model, batches, inputs.processor).values()
        return 100 / value if is_text else value

    subject = Subject(
        Path(settings.model).name,
        model,
        data,
        "probability of the next token (%)" if is_text else f"{metric} (%)",
        evaluate,
        None if inputs.task == "image-classification" else inputs.processor,
        {"task": inputs.task, "rows": [len(watched.rows), len(measured.rows)], **inputs.facts},
    )
    others = {Path(other).name: _model(inputs, other).load(settings.seed) for other in compare}
    if subject.name in others:  # such as two folders called model
        others = {f"{name} (compared)": model for name, model in others.items()}
    return subject, others


def _model(inputs: Dataset, model: str) -> Dataset:
    """Take another model for the same rows."""
    name = models.resolve(model)
    return replace(inputs, name=name, config=models.load_config(name))


def _rows(inputs: Dataset, chosen: range) -> Dataset:
    rows: Any = inputs.rows.select(chosen)
    return replace(inputs, rows=rows)
