"""`quanttune refit`."""

from pathlib import Path
from typing import Annotated

import typer

from ..jobs.settings import Settings
from . import options
from .terminal import Json, say, showing, write_numbers


@options.grouped(settings=options.dataset)
def run(
    settings: Settings,
    out: Annotated[Path, typer.Option(help="Folder of the refitted model.")],
    clamp: Annotated[
        float | None,
        typer.Option(help="Range of all sums.", show_default="measured, by --tolerance"),
    ] = None,
    tolerance: Annotated[
        float, typer.Option(min=0, help="How far a clamp may move the answers, of their norm.")
    ] = 0.1,
    limit: Annotated[int, typer.Option(min=1, help="Rows, drawn by the seed.")] = 640,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Load and check all; stop.")] = False,
    json: Json = None,
) -> None:
    """Solve a model's Linear modules anew, without training: smaller ranges, the same answers.

    Tune the result, or quantize it as it is.

    Example: quanttune refit sst2/model --data nyu-mll/glue --subset sst2 --out sst2-refit
    """
    from ..jobs.refit import refit

    with showing() as progress:
        outcome = refit(
            settings, out, clamp=clamp, tolerance=tolerance, limit=limit, dry_run=dry_run,
            say=say, progress=progress,
        )  # fmt: skip
    if not dry_run:
        say(f"the model is in {out}")
    write_numbers(json, outcome)
