"""Which rows `quanttune auto` learns from, chooses by, and tests on: no row is in two of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

from torch import nn

from .dataset import Dataset, load_dataset
from .metrics import LAST_WORDS, choose, measure
from .models import find_model
from .rows import fingerprint, load_rows
from .settings import Settings


@dataclass(frozen=True)
class Request:
    """What is asked for, beside a model and its data.

    Args:
        target: a name in quanttune.choosing.targets.TARGETS.
        metric: a name in METRICS. drop: as of `quanttune.auto`.
        learning_split: of the dataset; ranges are taken from its rows.
        test_split: by default the test rows are half of those of `settings.split`.
        limit, refit_rows: rows for ranges and methods, and for a refit.
        rows: of validation, and of test, at most.
        bits, weight_bits: as of `quantize`.
    """

    target: str
    metric: str
    drop: str = "1%"
    learning_split: str = "train"
    test_split: str | None = None
    limit: int = 320
    refit_rows: int = 640
    rows: int = 512
    bits: int = 8
    weight_bits: int | None = None

    @property
    def widths(self) -> dict[str, Any]:
        return {"bits": self.bits, "weight_bits": self.weight_bits}


def request_of(settings: Settings, metrics: Sequence[str], given: Mapping[str, Any]) -> Request:
    """Return a request with the metric that was asked for, or the first of the task's.

    Raises:
        ValueError: there is no such metric, more than one was asked for, or the model has a decoder
            beside its encoder, which no file is written of.
    """
    source = find_model(settings)
    if source.task == "text2text-generation":
        raise ValueError("auto writes no file of models that have an encoder and a decoder yet")
    if len(metrics) > 1:
        raise ValueError(f"auto chooses by one metric, got {', '.join(metrics)}")
    labels = getattr(source.config, "num_labels", 0)
    return Request(metric=choose(source.task, settings.subset, metrics, labels)[0], **given)


@dataclass(frozen=True)
class Rows:
    """Rows of a dataset, by what they are for."""

    learning: Dataset
    validation: Dataset
    test: Dataset

    @property
    def facts(self) -> dict[str, Any]:
        """What was read, and how many rows of it are for what."""
        parts = {"learning": self.learning, "validation": self.validation, "test": self.test}
        counts = {name: len(part.rows) for name, part in parts.items()}
        return {
            "model": self.learning.facts["model"],
            "data": {name: part.facts["data"]["fingerprint"] for name, part in parts.items()},
            "rows": counts,
        }


def load_parts(settings: Settings, request: Request) -> Rows:
    """Return the rows of a run, drawn by `settings.seed`; texts are parted before they are joined.

    Where there is but one split, such as a file's, it gives all three.

    Raises:
        ValueError: the data do not fit.
    """
    learning_rows = max(request.limit, request.refit_rows)
    splits = {
        "learning": replace(settings, split=request.learning_split),
        "validation": settings,
        "test": replace(settings, split=request.test_split) if request.test_split else settings,
    }
    wanted = {"learning": learning_rows, "validation": request.rows, "test": request.rows}
    task = find_model(settings).task
    prints = {name: fingerprint(load_rows(one, task)) for name, one in splits.items()}
    found = {}
    for name, one in splits.items():
        # of one split each takes its own share
        shared = [other for other in splits if prints[other] == prints[name]]
        part = _share(shared, wanted, name)
        last_words = name != "learning" and request.metric in LAST_WORDS
        data = load_dataset(one, limit=wanted[name], part=part, last_words=last_words)
        found[name] = first_rows(data, wanted[name])
    return Rows(**found)


def first_rows(data: Dataset, count: int) -> Dataset:
    """Return a dataset of the first rows of another one."""
    return replace(data, rows=data.rows.select(range(min(count, len(data.rows)))))


def _share(names: list[str], wanted: Mapping[str, int], name: str) -> tuple[float, float]:
    """Return where the rows of a part begin and end, among those that share a split with it."""
    ends = [0, *accumulate(wanted[other] for other in names)]
    i = names.index(name)
    return ends[i] / ends[-1], ends[i + 1] / ends[-1]


def evaluation(
    settings: Settings, data: Dataset, metric: str
) -> Callable[[nn.Module, range], float]:
    """Return what measures a model on some of the rows, by their numbers."""

    def evaluate(model: nn.Module, rows: range) -> float:
        some = replace(data, rows=data.rows.select(rows))
        batches = some.batches(settings, model)
        return measure((metric,), model, batches, data.processor)[metric]

    return evaluate
