"""Rows of a dataset, as a model takes them. Reading them is the work of `datasets`."""

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.compute
from datasets import ClassLabel, Dataset, Image, Value, load_dataset

from .settings import Settings

_READERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
    ".txt": ("text", {}),  # a row is a line
}


@dataclass(frozen=True)
class Labels:
    """The labels of a column, in their order.

    Args:
        names: what they are called; values: what stands for them in the rows.
        numbered: whether they were whole numbers, which tell no names.
    """

    names: list[str]
    values: list[Any]
    numbered: bool


def load_rows(settings: Settings, task: str) -> Dataset:
    """Return the rows with the columns that the task needs: inputs first, then the label."""
    rows = _read(settings)
    missing = {*settings.text, *([settings.label] if settings.label else [])} - {*rows.features}
    if missing:
        raise ValueError(
            f"{settings.data} has no column {', '.join(sorted(missing))}: it has "
            f"{', '.join(rows.column_names)}"
        )
    if task == "text-generation":
        return rows.select_columns(_inputs(rows, settings, limit=1))
    if task == "text2text-generation":
        return rows.select_columns(_pair(rows, settings))
    label = settings.label or _label(rows)
    if task == "image-classification":
        return rows.select_columns([_image(rows), label])
    return rows.select_columns([*_inputs(rows, settings, limit=2, label=label), label])


def labels_of(rows: Dataset) -> Labels:
    """Return the labels in the last column of rows.

    Raises:
        ValueError: a row has none, or they are neither names nor whole numbers from 0.
    """
    column = rows.column_names[-1]
    feature = rows.features[column]
    values = rows.unique(column)
    if any(map(_is_empty, values)):
        found = [
            i for i, value in enumerate(rows.select_columns(column)[column]) if _is_empty(value)
        ]
        more = f", and in {len(found) - 1} more" if len(found) > 1 else ""
        raise ValueError(
            f"column {column!r} is empty in row {found[0] + 1}{more}: give each row a label, or "
            "leave it out"
        )
    if _is_text(rows, column) and not all(map(str.isdecimal, values)):
        return Labels(sorted(values), sorted(values), False)
    if not all(_is_whole(value) for value in values):
        raise ValueError(
            f"labels must be names, or whole numbers from 0, got {sorted(map(str, values))[:5]} in "
            f"column {column!r}: scores, such as those of stsb, are not supported, and -1 stands "
            "for no label, as in the test rows of GLUE"
        )
    if isinstance(feature, ClassLabel):
        return Labels(list(feature.names), list(range(len(feature.names))), False)
    values.sort(key=int)
    return Labels([str(int(value)) for value in values], values, True)


def drawn(rows: Dataset, limit: int | None, seed: int) -> Dataset:
    """Return so many rows, drawn by a seed; all, in their order, where there are no more."""
    return rows.shuffle(seed).select(range(limit)) if limit and limit < len(rows) else rows


def fingerprint(rows: Dataset) -> str:
    """Return a hash of the rows; of an image it takes the name of its file, not the pixels."""
    digest = hashlib.sha256(f"{len(rows)} {rows.features}".encode())
    images = [name for name, feature in rows.features.items() if isinstance(feature, Image)]
    for name in images:
        rows = rows.cast_column(name, Image(decode=False))
    for table in rows.with_format("arrow").iter(batch_size=1000):
        for name in rows.column_names:
            column = table[name]
            if name in images:
                column = pyarrow.compute.struct_field(column, "path")
            values = column.to_pylist()
            if name in images:
                values = [value and Path(value).name for value in values]
            digest.update(repr(values).encode())
    return digest.hexdigest()


def splits_of(settings: Settings) -> list[str]:
    """Return the names of a dataset's splits; a file has one."""
    with _telling_what_is_missing(settings):
        return list(_loader(settings)())


def _read(settings: Settings) -> Dataset:
    with _telling_what_is_missing(settings):
        rows = _split(_loader(settings), settings)
    is_text = Path(settings.data).suffix.lower() == ".txt"
    return rows.filter(_is_no_blank, batched=True) if is_text else rows


def _loader(settings: Settings) -> Callable[..., Any]:
    """Return what loads a dataset: all splits, or the one that it is told."""
    path = Path(settings.data).expanduser()
    suffix = path.suffix.lower()
    if path.is_file() and suffix not in _READERS:
        raise ValueError(f"a data file must be one of {', '.join(_READERS)}, got {path.name}")
    if path.is_file() and settings.subset:
        raise ValueError(f"a data file has no subsets, got {settings.subset!r}")
    if path.is_file():
        reader, options = _READERS[suffix]
        return partial(load_dataset, reader, data_files=str(path), **options)
    if path.is_dir():
        return partial(load_dataset, str(path), settings.subset)
    if suffix in _READERS or settings.data.startswith((".", "~", os.sep)):
        raise FileNotFoundError(f"there is no file or folder {settings.data}")
    return partial(load_dataset, settings.data, settings.subset)


@contextmanager
def _telling_what_is_missing(settings: Settings) -> Iterator[None]:
    """Say of a name that it is neither a file nor a dataset of the Hub."""
    try:
        yield
    except (FileNotFoundError, ConnectionError) as error:
        if Path(settings.data).expanduser().exists() or "there is no file" in str(error):
            raise
        raise FileNotFoundError(
            f"there is no file or folder {settings.data}, and no dataset of that name can be had "
            "from the Hugging Face Hub"
        ) from error


def _split(load: Callable[..., Any], settings: Settings) -> Dataset:
    """Return the rows of a split: by default those of validation, or the only ones."""
    if settings.split is None:
        found = load()
        if "validation" in found or len(found) == 1:
            return found.get("validation") or next(iter(found.values()))
        raise ValueError(
            f"{settings.data} has no split validation, but {', '.join(found)}: say which with "
            "--split"
        )
    try:
        return load(split=settings.split)
    except ValueError as error:
        if "split" not in str(error):
            raise
        raise ValueError(
            f"{settings.data} has no split {settings.split}, but {', '.join(load())}: say which "
            "with --split"
        ) from error


def _is_no_blank(batch: dict[str, list[str]]) -> list[bool]:
    return [bool(text.strip()) for text in batch["text"]]


def _is_empty(value: Any) -> bool:
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def _is_whole(value: Any) -> bool:
    number = float(value) if isinstance(value, str | int | float) else -1.0
    return number >= 0 and number.is_integer()


def _label(rows: Dataset) -> str:
    classes = [name for name, feature in rows.features.items() if isinstance(feature, ClassLabel)]
    named = [name for name in ("label", "labels") if name in rows.features]
    if named or len(classes) == 1:
        return (named or classes)[0]
    raise ValueError(f"say which column is the --label: {', '.join(rows.column_names)}")


def _image(rows: Dataset) -> str:
    for name, feature in rows.features.items():
        if isinstance(feature, Image):
            return str(name)
    raise ValueError(f"no column holds images: {_types(rows)}")


def _inputs(rows: Dataset, settings: Settings, limit: int, label: str = "") -> list[str]:
    """Return the columns of text: those asked for, or all that there are."""
    texts = [name for name in rows.column_names if name != label and _is_text(rows, name)]
    for name in settings.text:
        if not _is_text(rows, name):
            raise ValueError(f"column {name!r} holds no text: {_types(rows)}")
    names = list(settings.text) or texts
    if not 1 <= len(names) <= limit:
        wanted = "one column" if limit == 1 else "one or two columns"
        raise ValueError(
            f"{wanted} of text needed, found {', '.join(names) or 'none'} among "
            f"{_types(rows)}: say which with --text"
        )
    return names


def _pair(rows: Dataset, settings: Settings) -> list[str]:
    """Return the columns of the texts that are read and written."""
    texts = [name for name in rows.column_names if _is_text(rows, name)]
    given = [*settings.text, *([settings.label] if settings.label else [])]
    names = given if len(given) == 2 and settings.label else texts if not given else []
    if len(names) != 2 or not {*names} <= {*texts}:
        raise ValueError(
            "two columns of text needed, one to read and one to write, found "
            f"{', '.join(given or texts) or 'none'} among {_types(rows)}: say which with --text "
            "and --label"
        )
    return names


def _is_text(rows: Dataset, column: str) -> bool:
    feature = rows.features[column]
    return isinstance(feature, Value) and "string" in feature.dtype


def _types(rows: Dataset) -> str:
    return ", ".join(
        f"{name} ({getattr(feature, 'dtype', type(feature).__name__)})"
        for name, feature in rows.features.items()
    )
