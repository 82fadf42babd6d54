"""Files that are there whole or not at all."""

import json
import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_json(path: Path, data: Any) -> None:
    """Write a JSON file so that it is there whole or not at all."""
    write_text(path, json.dumps(data, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a name to write to; what is there becomes the file when it is on the disk.

    The name is nobody else's: threads of a process, and containers that share a disk and number
    their processes alike, may write one file at a time. The last one's is there in the end, whole.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        yield partial
        sync(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    sync(path.parent)


def check_writable(path: Path) -> None:
    """Refuse, before long work, a name that nothing could be written under.

    Raises:
        ValueError: the folder is read-only, or none.
    """
    parents = [path] if path.is_dir() else path.absolute().parents
    folder = next(parent for parent in parents if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=folder):
            return
    except OSError as error:
        raise ValueError(f"{path} cannot be written ({error}): choose another name") from error


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk (POSIX)."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
