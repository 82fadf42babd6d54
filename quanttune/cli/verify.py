"""`quanttune verify`."""

from pathlib import Path
from typing import Annotated

import typer

from ..jobs.settings import Settings
from . import options
from .terminal import Json, say, showing, write_numbers

OF_DATA = ("subset", "split", "text", "label", "metric", "tokens", "limit", "tolerance")


@options.grouped(settings=options.measured_dataset)
def run(
    context: typer.Context,
    settings: Settings,
    model: Annotated[str, typer.Argument(help="The folder that the file was made from.")],
    onnx: Annotated[Path, typer.Option(help="A file, or folder, of quanttune export.")],
    metric: options.Metrics = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Rows, drawn by the seed.")] = None,
    tolerance: Annotated[
        float,
        typer.Option(min=0, help="Per cent points of a metric, or per cent of a perplexity."),
    ] = 1.0,
    json: Json = None,
) -> None:
    """Check that an ONNX file computes what the quantized model of a folder simulates.

    Layer by layer on the first batch, and by the metric on all rows, beside a control: the
    simulation with a little noise. Without data only layers are compared, on two rows of our own.
    Ends with status 1 if the file fails, and with what is wrong in the last line.

    Example: quanttune verify sst2-w8a8 --onnx sst2.onnx --data nyu-mll/glue --subset sst2
    """
    if not settings.data:
        options.refuse_given(context, OF_DATA, "with --data")
    with options.of_extra("deploy"):
        from ..jobs.verify import verify

    with showing() as progress:
        found, outcome = verify(
            settings, onnx, metrics=metric or (), limit=limit, tolerance=tolerance, say=say,
            progress=progress,
        )  # fmt: skip
    say(str(found))
    write_numbers(json, outcome)
    _print(outcome["measured"], outcome["rows"])
    if not found.passed:
        say(f"{onnx} fails: {found.problems[0]}")
        raise typer.Exit(1)


def _print(measured: dict[str, dict[str, float]] | None, rows: int) -> None:
    """Print a line for each metric: of the simulation, the file and the noise."""
    if measured is None:
        return
    for name in measured["simulation"]:
        numbers = (f"{which} {numbers[name]:.6g}" for which, numbers in measured.items())
        say(f"{name} of {rows} rows: {', '.join(numbers)}")
