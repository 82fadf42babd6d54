"""The rows of a model and a task: some to learn from, some to choose alpha by, some to measure."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ...progress import Progress, track
from .. import models
from ..dataset import Dataset, load_dataset
from ..metrics import LAST_WORDS, measure
from ..models import find_model
from ..rows import splits_of
from ..settings import Settings
from .tables import Task

HELD_OUT = 0.1  # of the training rows: the paper's share
BATCHES = 10  # of calibration, as in the paper
TRAIN = "train"
SPLITS, IMAGES = ("train", "val", "validation"), {".jpeg", ".jpg", ".png"}

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Inputs:
    """Rows by what they are for.

    Args:
        has_head: whether the model, as it comes, is for the task.
        said: what a user should know.
        workers: processes that make the rows that are measured ready, beside this one.
    """

    task: Task
    learning: Dataset
    held_out: Dataset
    measured: Dataset
    has_head: bool
    said: Sequence[str]
    workers: int

    @property
    def fingerprint(self) -> str:
        """A hash of the model's name, and of the rows."""
        parts = (self.learning, self.held_out, self.measured)
        facts = [[part.facts, len(part.rows)] for part in parts]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    def calibration(self, settings: Settings, model: nn.Module, rows: int) -> list[Batch]:
        """Return rows that `settings.seed` draws, without labels, in ten batches."""
        rows = min(rows, len(self.learning.rows))
        settings = replace(settings, batch_size=-(-rows // BATCHES))
        batches = self.learning.batches(settings, model, rows)
        return [{name: x for name, x in batch.items() if name != "labels"} for batch in batches]

    def measure(
        self, settings: Settings, model: nn.Module, data: Dataset, progress: Progress
    ) -> dict[str, float]:
        """Return the task's metrics of a model, of the rows that are measured or held out."""
        batches = data.batches(settings, model, workers=self.workers)
        rows = track(batches, f"measuring {self.task.name}", progress)
        return measure(self.task.metrics, model, rows, data.processor)


def load_inputs(
    settings: Settings, task: Task, training_data: str, limit: int | None, workers: int = 0
) -> Inputs:
    """Read the rows of a task.

    Where the data have no training rows, the first half of those that are measured stands in for
    them, which is said.

    Args:
        settings: which model and data.
        training_data: other data to learn from; "" takes those of `settings`.
        limit: take no more rows than so many of any part.

    Raises:
        ValueError: the data do not fit; it says what would.
    """
    settings = replace(settings, subset=task.subset)
    measured, parts, said = _parts(settings, task, training_data)
    options: dict[str, Any] = {"limit": limit, "scores": task.is_score}
    options["new_head"] = settings.task == "text-classification"
    last_words = bool(LAST_WORDS & {*task.metrics})
    learning, middle, end = parts
    found = {
        "learning": load_dataset(learning, **options, part=(0, middle)),
        "held_out": load_dataset(learning, **options, part=(middle, end), last_words=last_words),
        "measured": load_dataset(
            measured, **options, part=None if end == 1 else (end, 1), last_words=last_words
        ),
    }
    configs = [part.config for part in found.values()]
    names = {tuple(models.names_of(config)) for config in configs}
    if settings.task == "text-classification" and len(names) > 1:
        raise ValueError(
            f"the splits of {settings.data} have other labels: "
            f"{' and '.join(', '.join(some) for some in sorted(names))}"
        )
    for name, part in found.items():
        if not len(part.rows):
            raise ValueError(f"{settings.data} has too few rows: none is left for {name}")
        said += [line for line in part.said if line not in said]
    has_head = _has_head(settings, configs[0])
    return Inputs(task, **found, has_head=has_head, said=said, workers=workers)


def measured_split(settings: Settings, task: Task) -> Settings:
    """Return the settings of the rows that a task is measured on.

    Raises:
        ValueError: the data have no such split.
    """
    settings = replace(settings, subset=task.subset)
    if settings.task == "image-classification":
        _check_classes(Path(settings.data).expanduser())
    names = _splits(settings)
    split = next((name for name in task.splits if name in names), None)
    if split is None and len(names) > 1:
        raise ValueError(
            f"{settings.data} has the splits {', '.join(names)}, and {task.label} is measured on "
            f"{' or '.join(task.splits)}"
        )
    return _at(settings, split or names[0])


def _parts(
    settings: Settings, task: Task, training_data: str
) -> tuple[Settings, tuple[Settings, float, float], list[str]]:
    """Return the split to measure; the one to learn from, and where its parts end."""
    measured, names = measured_split(settings, task), _splits(settings)
    if training_data:
        other = replace(settings, data=training_data)
        found = _splits(other)
        learning = _at(other, TRAIN if TRAIN in found else found[0])
    elif TRAIN in names and len(names) > 1:
        learning = _at(settings, TRAIN)
    else:
        said = (
            f"{settings.data} has no rows for training: half of those that would be measured "
            "calibrate and tune, the other half is measured, so that figures are not of the "
            "published rows"
        )
        return measured, (measured, (1 - HELD_OUT) / 2, 0.5), [said]
    return measured, (learning, 1 - HELD_OUT, 1), []


def _splits(settings: Settings) -> list[str]:
    folder = _subset_folder(settings)
    if not folder:
        return splits_of(settings)
    names = sorted({path.name.split(".")[0].split("-")[0] for path in folder.iterdir()})
    if not names:
        raise ValueError(f"{folder} is empty")
    return names


def _at(settings: Settings, split: str) -> Settings:
    """Return the settings of a split, which in a folder for each subset is a file."""
    folder = _subset_folder(settings)
    if not folder:
        return replace(settings, split=split)
    found = sorted(folder.glob(f"{split}[.-]*"))
    if len(found) != 1:
        raise ValueError(f"{folder} must have one file {split}, such as {split}.jsonl")
    return replace(settings, data=str(found[0]), subset=None, split=None)


def _check_classes(data: Path) -> None:
    """Refuse a split of images that lie beside one another, as some copies of ImageNet have it."""
    for split in (path for name in SPLITS for path in data.glob(name)):
        if found := sorted(path for path in split.iterdir() if path.suffix.lower() in IMAGES):
            raise ValueError(
                f"{split} must have a folder for each class with its images, such as "
                f"{split.name}/n01440764/*.JPEG, found {found[0].name}"
            )


def _subset_folder(settings: Settings) -> Path | None:
    """Return the folder of a subset's files, unless a README tells `datasets` what is where."""
    data = Path(settings.data).expanduser()
    if not settings.subset or not data.is_dir() or _names_subsets(data / "README.md"):
        return None
    folder = data / settings.subset
    if not folder.is_dir():
        raise ValueError(
            f"{data} has no folder {settings.subset}: wanted are a copy of nyu-mll/glue, or a "
            f"folder for each subset with files such as {settings.subset}/train.jsonl"
        )
    return folder


def _names_subsets(readme: Path) -> bool:
    return readme.is_file() and "config_name:" in readme.read_text(encoding="utf-8")


def _has_head(settings: Settings, config: Any) -> bool:
    """Tell whether a model, as it comes, has a head for the labels of the data."""
    source = find_model(settings)
    own = source.config
    if not models.is_for(own, source.task):
        return False
    same = models.is_nameless(own) or models.names_of(own) == models.names_of(config)
    return own.num_labels == config.num_labels and same
