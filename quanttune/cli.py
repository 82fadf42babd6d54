"""The command line: each verb is a short function that calls the library."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
console = Console()

Json = Annotated[Path | None, typer.Option(help="Write the numbers to this file as well.")]


@app.callback()
def about() -> None:
    """Make Transformers ready for plain integer quantization."""


@app.command()
def demo(
    task: Annotated[str, typer.Option(help="minilm or digits.")] = "minilm",
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds to run, from 0.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("demo"),
    json: Json = None,
    model: Annotated[
        str | None, typer.Option(help="minilm: another Hugging Face id or local folder.")
    ] = None,
    dry_run: Annotated[bool, typer.Option(help="Say what would be done, and stop.")] = False,
) -> None:
    """Tune a model, quantize it before and after, and compare with the alternatives.

    Example: quanttune demo --task digits --seeds 3 --out digits
    """
    from .analysis import report
    from .recipes import experiment, recipe

    make = recipe(task)
    if dry_run:
        names = ", ".join(arm.name for arm in make.arms)  # type: ignore[attr-defined]
        console.print(f"{task}: {seeds} seed(s) of {names}; results in {out}")
        return
    with _progress() as progress:
        bar = progress.add_task("loading", total=experiment.units(make, seeds))

        def advance(description: str, units: float) -> None:
            progress.update(bar, description=description, advance=units)

        options = {"model": model} if model else {}
        results = experiment.run(make, seeds, advance, **options)
    files = report.write(results, out)
    if json:
        json.parent.mkdir(parents=True, exist_ok=True)
        report.write_json(json, results.as_dict())
    _print_results(results)
    console.print(f"{results.seconds:.0f} s. Written: {', '.join(map(str, files))}")


@app.command()
def doctor(json: Json = None) -> None:
    """Print versions, which kernels serve which device and why, and what would mend what is
    missing.

    Example: quanttune doctor
    """
    from .analysis.environment import environment
    from .analysis.report import write_json
    from .ops import backends

    facts = environment()
    for name, value in facts.items():
        if not isinstance(value, dict):
            console.print(f"{name:10} {value}", highlight=False)
    for package, version in facts["versions"].items():
        console.print(f"{package:12} {version or 'not installed'}", highlight=False)
    for device, backend in backends().items():
        console.print(f"{device:6} [bold]{backend.name}[/bold]: {backend.reason}", highlight=False)
        if backend.name == "reference" and device in _MENDS:
            console.print(f"       to mend it: {_MENDS[device]}", highlight=False)
    if json:
        write_json(json, facts)


_MENDS = {
    "cpu": "install g++ and run: pip install --force-reinstall --no-deps quanttune",
    "cuda": "pip install triton",
}


def main() -> None:
    """Run the command line; bad arguments and interruptions end in one line, not in a traceback."""
    try:
        app()
    except KeyboardInterrupt:
        console.print("interrupted: nothing was written", style="red")
        sys.exit(130)
    except (ValueError, ModuleNotFoundError, OSError) as error:
        console.print(f"error: {error}", style="red", markup=False)
        sys.exit(2)


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
        console=console,
    )


def _print_results(results: Any) -> None:
    from .analysis.report import DIGITS
    from .analysis.table import tabulate

    summary = tabulate(results.rows)
    table = Table(
        title=f"{results.task}: {results.metric} on the test rows",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
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


if __name__ == "__main__":
    main()
