"""`quanttune demo`."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table

from .terminal import Json, console, progress_bar, say, writable, write_numbers, written


def run(
    task: Annotated[str, typer.Option(help="minilm, digits, smollm2 or whisper.")] = "minilm",
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds to run, from 0.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder of the report.", callback=writable)] = Path(
        "demo"
    ),
    json: Json = None,
    model: Annotated[
        str | None, typer.Option(help="Another Hugging Face id or local folder; not for digits.")
    ] = None,
    test_rows: Annotated[
        int | None,
        typer.Option(
            help="Rows to measure on; not for digits.",
            show_default="minilm 48, smollm2 16, whisper 16; of 512, 240, 48",
        ),
    ] = None,
    calibrator: Annotated[
        list[str] | None,
        typer.Option(help="Quantize with it; repeat for several. By default minmax, percentile."),
    ] = None,
    dry_run: Annotated[bool, typer.Option(help="Say what would be done, and stop.")] = False,
) -> None:
    """Tune a model, quantize it before and after, and compare with the alternatives.

    Example: quanttune demo --task digits --seeds 3 --out digits
    """
    from ..demo import experiment, recipe
    from ..quantization.calibrators import CALIBRATORS
    from ..report import report

    make, calibrators = recipe(task), calibrator or ()
    if unknown := set(calibrators) - set(CALIBRATORS):
        names = ", ".join(CALIBRATORS)
        raise ValueError(f"a calibrator is one of {names}, got {', '.join(sorted(unknown))}")
    if dry_run:
        names = ", ".join(arm.name for arm in make.arms)  # type: ignore[attr-defined]
        say(f"{task}: {seeds} seed(s) of {names}; results in {out}")
        return
    with progress_bar() as progress:
        bar = progress.add_task("loading", total=experiment.units(make, seeds, calibrators))

        def advance(description: str, units: float) -> None:
            progress.update(bar, description=description, advance=units)

        rows = getattr(make, "demo_rows", None) if test_rows is None else test_rows
        options = {"model": model, "test_rows": rows}
        results = experiment.run(make, seeds, advance, calibrators, **options)
    written.append(out)
    files = report.write(results, out)
    write_numbers(json, results.as_dict())
    _print_results(results)
    say(f"{results.seconds:.0f} s. Written: {', '.join(map(str, files))}")


def _print_results(results: Any) -> None:
    from ..report.results_table import DIGITS, tabulate

    summary = tabulate(results.rows)
    table = Table(
        title=f"{results.task}: {results.metric} on the test rows; weights per channel if not said",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=0,  # eight arms fit into 80 columns
    )
    table.add_column("", no_wrap=True)
    for arm in summary.arms:
        table.add_column(arm, justify="right", no_wrap=True)
    group = None
    for way, cells in summary.cells.items():
        if way.group != group:
            group = way.group
            table.add_section()
        texts = [cell.text(DIGITS[results.metric], spread=False) for cell in cells]
        marked = [f"[bold]{t}[/bold]" if c.best else t for t, c in zip(texts, cells, strict=True)]
        table.add_row(f"{way.label} {way.short}", *marked)
    console.print(table)
    for caveat in results.caveats:
        console.print(f"- {caveat}", highlight=False)
