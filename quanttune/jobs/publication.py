"""Folders that one process writes at a time, and that are there whole or not at all."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..files import sync

LOCK = ".lock"


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder, which is made for it.

    The lock goes with its process, however that ends. So does the folder, if nothing is in it.

    Raises:
        ValueError: another process holds it.
    """
    is_new = not folder.exists()
    lock = FileLock(folder / LOCK, timeout=0)
    while not lock.is_locked:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except FileNotFoundError:
            continue  # another process has just published the folder, or removed it
        except Timeout as error:
            raise ValueError(
                f"another process is at work in {folder}: wait for its end, or choose another --out"
            ) from error
    try:
        yield
    finally:
        with suppress(OSError):  # on Windows only what nobody has open goes
            (folder / LOCK).unlink()
        lock.release()
        if is_new:
            with suppress(OSError):  # it holds something
                folder.rmdir()


@contextmanager
def reserved(folder: Path) -> Iterator[None]:
    """Check that nothing is in a folder, and keep other processes from publishing one there.

    Raises:
        ValueError: it holds something, or another process is about to write it.
    """
    check_empty(folder)
    partial = partial_of(folder)
    try:
        with held(partial):
            check_empty(folder)  # which another process may have done in between
            yield
    finally:
        with suppress(OSError):  # it holds something, or is gone
            partial.rmdir()  # that of another process was there first, and became its folder


def publish(model: Any, processor: Any, folder: Path) -> None:
    """Save a model with what makes its inputs, under the folder's name only when it is whole."""
    partial = write(model, processor, folder)
    check_empty(folder)  # what another program put there meanwhile stays
    if folder.exists():
        folder.rmdir()  # on Windows nothing takes the place of a folder
    partial.rename(folder)
    (folder / LOCK).unlink(missing_ok=True)
    sync(folder.parent)


def write(model: Any, processor: Any, folder: Path, state: dict[str, Any] | None = None) -> Path:
    """Save a model and what makes its inputs beside a folder, and return where.

    state: the model's weights, if they are not those that it holds.
    """
    partial = partial_of(folder)
    if partial.exists():  # from a process that was killed
        for path in partial.iterdir():
            if path.name != LOCK:
                remove(path)
    model.save_pretrained(partial, **({} if state is None else {"state_dict": state}))
    processor.save_pretrained(partial)
    for path in partial.rglob("*"):
        sync(path)
    return partial


def partial_of(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}")


def remove(path: Path) -> None:
    """Remove a file, or a folder with what is in it."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def check_empty(folder: Path) -> None:
    """Refuse a folder that holds something."""
    if folder.is_file():
        raise ValueError(f"{folder} is a file: choose another --out")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty: choose another --out")
