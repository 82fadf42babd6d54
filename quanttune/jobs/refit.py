"""Refit a model to the inputs of a dataset. What `quanttune refit` does."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from ..progress import Progress, silent
from ..refitting.refit import refit as refit_model
from .dataset import Dataset, load_dataset
from .publication import check_empty, publish, reserved
from .settings import Settings


def refit(
    settings: Settings,
    out: Path,
    *,
    clamp: float | None = None,
    tolerance: float = 0.1,
    limit: int | None = None,
    dry_run: bool = False,
    say: Callable[[str], None] = print,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Solve a model's Linear modules anew on a dataset, and write it to the folder `out`.

    Args:
        clamp, tolerance: as in `quanttune.refit`.
        limit: rows, drawn by the seed.
        dry_run: load all, and stop before the work.

    Raises:
        ValueError: an argument, the data or the folder does not fit; it says what would.
    """
    if dry_run:
        check_empty(out)
    inputs = load_dataset(settings, limit=limit)
    for line in inputs.said:
        say(line)
    with nullcontext() if dry_run else reserved(out):
        name = _refit(inputs, settings, out, clamp, tolerance, dry_run, progress)
    rows = len(inputs.rows)
    say(f"{inputs.task}: {name}, {'to be ' if dry_run else ''}refitted on {rows} rows")
    facts = {"out": str(out), "task": inputs.task, "rows": rows, **inputs.facts}
    return {**facts, "clamp": clamp, "tolerance": tolerance}


def _refit(
    inputs: Dataset,
    settings: Settings,
    out: Path,
    clamp: float | None,
    tolerance: float,
    dry_run: bool,
    progress: Progress,
) -> str:
    model = inputs.load_float(settings.seed)
    if not dry_run:
        batches = inputs.batches(settings, model)
        refit_model(model, batches, clamp=clamp, tolerance=tolerance, progress=progress)
        publish(model.cpu(), inputs.processor, out)
    return type(model).__name__
