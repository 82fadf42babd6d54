"""`quanttune refit`."""

from pathlib import Path
from typing import Annotated

import typer

from . import options
from .terminal import Json, say, showing, write_numbers


def run(
    model: options.Model,
    data: options.Data,
    out: Annotated[Path, typer.Option(help="Folder of the refitted model.")],
    task: options.Task = None,
    subset: options.Subset = None,
    split: options.Split = "train",
    text: options.Columns = None,
    label: options.Label = None,
    tokens: options.Tokens = 128,
    clamp: Annotated[
        float | None,
        typer.Option(help="Range of all sums.", show_default="measured, by --tolerance"),
    ] = None,
    tolerance: Annotated[
        float, typer.Option(min=0, help="How far a clamp may move the answers, of their norm.")
    ] = 0.05,
    limit: Annotated[int, typer.Option(min=1, help="Rows, drawn by the seed.")] = 640,
    batch_size: options.BatchSize = 32,
    seed: options.Seed = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Load and check all; stop.")] = False,
    json: Json = None,
) -> None:
    """Solve a model's Linear modules anew, without training: smaller ranges, the same answers.

    Tune the result, or quantize it as it is.

    Example: quanttune refit sst2/model --data nyu-mll/glue --subset sst2 --out sst2-refit
    """
    settings = options.settings_of(
        model=model, data=data, task=task, subset=subset, split=split, text=text, label=label,
        tokens=tokens, batch_size=batch_size, seed=seed,
    )  # fmt: skip
    from ..jobs.refit import refit

    with showing() as progress:
        outcome = refit(
            settings, out, clamp=clamp, tolerance=tolerance, limit=limit, dry_run=dry_run,
            say=say, progress=progress,
        )  # fmt: skip
    if not dry_run:
        say(f"the model is in {out}")
    write_numbers(json, outcome)
