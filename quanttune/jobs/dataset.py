"""A model's data, as its configuration and the settings of a run want them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from . import encoding, models, pairs
from .models import ModelSource, find_model
from .rows import Labels, drawn, fingerprint, labels_of, load_rows
from .settings import Settings


@dataclass(frozen=True)
class Batches:
    """The batches of a loader, on a device; each time they are iterated, they are read again."""

    loader: DataLoader[Any]
    device: torch.device

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for batch in self.loader:
            yield {name: tensor.to(self.device) for name, tensor in batch.items()}


@dataclass(frozen=True)
class Dataset(ModelSource):
    """A model, and rows ready for it.

    Args:
        rows, collate: make a batch of `collate([rows[i], ...])`.
        facts: what was read, for a file beside the result.
        said: what a user should know.
    """

    processor: Any
    rows: Any
    collate: Callable[[list[Any]], Any]
    facts: dict[str, Any]
    said: list[str]

    def batches(
        self, settings: Settings, model: nn.Module, limit: int | None = None, workers: int = 0
    ) -> Batches:
        """Return the rows on the model's device, `settings.batch_size` at a time.

        limit: take so many, drawn by the seed. workers: processes that make them ready.
        """
        rows = drawn(self.rows, limit, settings.seed)
        loader = DataLoader(rows, settings.batch_size, collate_fn=self.collate, num_workers=workers)
        return Batches(loader, next(model.parameters()).device)


def load_dataset(
    settings: Settings,
    *,
    new_head: bool = False,
    limit: int | None = None,
    part: tuple[float, float] | None = None,
    last_words: bool = False,
    scores: bool = False,
) -> Dataset:
    """Read the data of a run and make them inputs of its model, which is not loaded yet.

    Args:
        new_head: whether labels that the model does not know get it a new head.
        limit: take so many rows, drawn by `settings.seed`.
        part: take those from one share of all to another, in the order that it draws.
        last_words: for generation, a row for the last word of each text.
        scores: the labels are numbers that the model is to come near, such as those of stsb.

    Raises:
        ValueError: the data do not fit the task or the model; it says what would.
    """
    source = find_model(settings)
    name, config, task = source.name, source.config, source.task
    rows = load_rows(settings, task)
    facts = {
        "model": source.origin,
        "data": {"rows": len(rows), "fingerprint": fingerprint(rows)},
    }
    said: list[str] = []
    classes: dict[Any, int] = {}
    if scores:
        models.expect_score(config)
        classes = {score: score for score in rows.unique(rows.column_names[-1])}
    elif task not in ("text-generation", "text2text-generation"):
        labels = labels_of(rows)
        if new_head and len(labels.names) < 2:
            raise ValueError(
                f"column {rows.column_names[-1]!r} has one label only, {labels.names[0]!r}: "
                "nothing to learn"
            )
        found = _classes(config, task, labels, new_head, said)
        classes = dict(zip(labels.values, found, strict=True))
    if part:
        ends = (round(share * len(rows)) for share in part)
        rows = rows.shuffle(settings.seed).select(range(*ends))
    rows = drawn(rows, limit, settings.seed)
    processor, tokens = models.load_processor(name, task), settings.tokens
    if task != "image-classification" and (most := models.longest(config, processor)) < tokens:
        tokens = most
        said.append(f"{tokens} tokens at most: the model takes no more")
    collate: Callable[[list[Any]], Any]
    if task == "text2text-generation":
        encoded, collate = pairs.encode(rows, processor, tokens, config)
    else:
        encoded, collate = encoding.encode(rows, task, processor, classes, tokens, last_words)
    return Dataset(name, config, task, processor, encoded, collate, facts, said)


def _classes(config: Any, task: str, labels: Labels, new_head: bool, said: list[str]) -> list[int]:
    """Return the model's class of each label, and add to `said` how they were found."""
    names, some = labels.names, ", ".join(labels.names[:5])
    classes = models.match_labels(config, task, names, labels.numbered)
    if not classes and not new_head:
        raise ValueError(
            f"the labels of the data ({some}) are not those of the model "
            f"({', '.join(models.names_of(config)[:5])}), or it was made for another task: tune it "
            "on them first"
        )
    if not classes:
        said.append(f"a new head for {len(names)} labels: {some}")
        return models.replace_labels(config, names)
    known = models.names_of(config)
    if models.is_nameless(config) and not (labels.numbered and classes == list(map(int, names))):
        said.append(f"the model does not name its classes, which are taken to be {some}")
        if new_head:
            models.name_classes(config, names)
    elif not models.is_nameless(config) and not models.are_ids_of_imagenet(names):
        taken = [
            f"{name} as {known[i]}"
            for name, i in zip(names, classes, strict=True)
            if name.casefold() != known[i].casefold()
        ]
        if taken:
            said.append(f"labels are taken by their numbers: {', '.join(taken[:5])}")
    return classes
