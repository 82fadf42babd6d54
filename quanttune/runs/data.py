"""Rows of a dataset, as a model takes them. Reading them is the work of `datasets`."""

import hashlib
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
}


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
    label = settings.label or _label(rows)
    if task == "image-classification":
        return rows.select_columns([_image(rows), label])
    return rows.select_columns([*_inputs(rows, settings, limit=2, label=label), label])


def number_labels(rows: Dataset) -> tuple[Dataset, list[str], bool]:
    """Return the rows with labels 0, 1, ..., their names, and whether they were numbers before."""
    column = rows.column_names[-1]
    feature = rows.features[column]
    if _is_text(rows, column):
        rows = rows.class_encode_column(column)
        feature = rows.features[column]
    values = rows.unique(column)
    if not all(isinstance(value, int) and value >= 0 for value in values):
        raise ValueError(
            f"labels must be names, or whole numbers from 0, got {sorted(map(str, values))[:5]} in "
            f"column {column!r}: scores, such as those of stsb, are not supported"
        )
    numbered = not isinstance(feature, ClassLabel)
    names = [str(value) for value in range(max(values) + 1)] if numbered else list(feature.names)
    if len(names) < 2:
        raise ValueError(f"column {column!r} has one label only, {names[0]!r}: nothing to learn")
    return rows, names, numbered


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


def _read(settings: Settings) -> Dataset:
    path = Path(settings.data)
    if not path.is_file():
        return load_dataset(settings.data, settings.subset, split=settings.split)
    if path.suffix not in _READERS:
        raise ValueError(f"a data file must be one of {', '.join(_READERS)}, got {path.name}")
    if settings.subset:
        raise ValueError(f"a data file has no subsets, got {settings.subset!r}")
    reader, options = _READERS[path.suffix]
    return load_dataset(reader, data_files=str(path), split=settings.split, **options)


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


def _is_text(rows: Dataset, column: str) -> bool:
    feature = rows.features[column]
    return isinstance(feature, Value) and "string" in feature.dtype


def _types(rows: Dataset) -> str:
    return ", ".join(
        f"{name} ({getattr(feature, 'dtype', type(feature).__name__)})"
        for name, feature in rows.features.items()
    )
