"""The folder of a run, which a command that failed before anything was measured leaves free."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..checkpoints import read_object
from ..publication import held, remove
from ..run_folder import RunFolder
from .request import Request

VERB = "reproduce"
RANDOM, MODELS, ANALYSES = "random", "models", "analyses"


def check_folder(out: Path, request: Request, resume: bool, **others: Any) -> None:
    """Refuse a folder that holds something else, or figures of another request.

    others: what, beside the request, decides the figures.
    """
    if not _is_idle(RunFolder(out)):
        RunFolder(out).check(_config(request, others), resume)


@contextmanager
def opened(out: Path, request: Request, resume: bool, **others: Any) -> Iterator[RunFolder]:
    """Yield the folder of a run, which is begun; no other process is at work in it."""
    check_folder(out, request, resume, **others)
    folder, config = RunFolder(out), _config(request, others)
    with held(out):
        if _is_idle(folder):
            remove(folder.config)
            if (out / RANDOM).exists():
                remove(out / RANDOM)
        folder.check(config, resume)  # another process may have been at work in between
        if not folder.is_begun:
            folder.begin(config)
        yield folder


def _config(request: Request, others: dict[str, Any]) -> dict[str, Any]:
    return {"settings": {"verb": VERB, "steps": None}, "request": asdict(request), **others}


def _is_idle(folder: RunFolder) -> bool:
    """Tell whether a run was begun, and nothing tuned or measured."""
    if not folder.is_begun or any((folder.path / name).exists() for name in (MODELS, ANALYSES)):
        return False
    settings = read_object(folder.config).get("settings")
    is_ours = isinstance(settings, dict) and settings.get("verb") == VERB
    return is_ours and folder.metrics.exists() and not folder.metrics.stat().st_size
