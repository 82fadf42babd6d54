"""Which folders of a run are whole: its checkpoints and its model.

The Trainer writes a checkpoint file by file under its final name. When the last one is written, a
mark goes beside them that lists the files and their digests; a folder without it, or of which a
file is gone or another one since, is not whole.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from ..files import sync, write_json

MARK = "complete.json"


def read_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        ValueError: there is none; it names the file.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} is damaged: no object, but {type(data).__name__}")
    return data


def mark(folder: Path, **facts: Any) -> None:
    """Note, once its files are on the disk, that a folder is whole, and facts about it."""
    for file in _files(folder):
        sync(file)
    sync(folder)
    write_json(folder / MARK, {**facts, "files": _digests(folder)})
    sync(folder.parent)


def is_complete(folder: Path, **facts: Any) -> bool:
    """Tell whether every file is what it was when a folder was marked, with the same facts."""
    if not (folder / MARK).is_file():
        return False
    try:
        marked = read_object(folder / MARK)
    except ValueError:
        return False
    files = marked.pop("files", None)
    if marked != facts or not (files and isinstance(files, dict)):
        return False
    return files.items() <= _digests(folder).items()


def find(run: Path) -> tuple[list[Path], list[Path]]:
    """Return the whole checkpoints of a run, the newest last, and the others."""
    found = [path for path in run.glob("checkpoint-*") if re.fullmatch(r"\d+", _number(path))]
    found.sort(key=step_of)
    whole = [path for path in found if is_complete(path)]
    return whole, [path for path in found if path not in whole]


def step_of(checkpoint: Path) -> int:
    return int(_number(checkpoint))


def _number(checkpoint: Path) -> str:
    return checkpoint.name.removeprefix("checkpoint-")


def _digests(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): _sha256(path) for path in _files(folder)}


def _files(folder: Path) -> list[Path]:
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MARK and not path.name.startswith(f".{MARK}")
    ]


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
