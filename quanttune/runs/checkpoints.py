"""Which checkpoints of the Trainer are whole.

The Trainer writes a checkpoint file by file under its final name. When the last one is written, a
mark goes beside them that lists the files and their sizes; a checkpoint without it, or of which a
file has gone since, is not whole.
"""

import json
import re
from pathlib import Path

from ..files import sync, write_json

MARK = "complete.json"


def mark(checkpoint: Path) -> None:
    """Note, once its files are on the disk, that a checkpoint is whole."""
    files = _files(checkpoint)
    for file in files:
        sync(checkpoint / file)
    sync(checkpoint)
    write_json(checkpoint / MARK, {"files": files})
    sync(checkpoint.parent)


def is_complete(checkpoint: Path) -> bool:
    """Tell whether every file is there that was when the checkpoint was marked."""
    if not (checkpoint / MARK).exists():
        return False
    files = _files(checkpoint)
    marked = json.loads((checkpoint / MARK).read_text(encoding="utf-8"))["files"]
    return all(files.get(name) == size for name, size in marked.items())


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


def _files(checkpoint: Path) -> dict[str, int]:
    return {
        path.relative_to(checkpoint).as_posix(): path.stat().st_size
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file() and path.name != MARK and not path.name.startswith(f".{MARK}")
    }
