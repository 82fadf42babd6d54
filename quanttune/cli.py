"""The command line: each verb is a short function that calls the library."""

import shlex
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
    from .files import write_json
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
        write_json(json, results.as_dict())
    _print_results(results)
    console.print(f"{results.seconds:.0f} s. Written: {', '.join(map(str, files))}")


Columns = Annotated[list[str] | None, typer.Option(help="A column; twice for pairs of texts.")]
Patterns = Annotated[list[str] | None, typer.Option(help="Names of modules, such as '*.mlp.*'.")]
Fields = Annotated[
    list[str] | None,
    typer.Option(metavar="KEY=VALUE", help="Any other field of transformers' TrainingArguments."),
]


@app.command()
def tune(
    model: Annotated[str, typer.Argument(help="A folder, a Hugging Face id or a timm name.")],
    data: Annotated[
        str,
        typer.Option(help="A folder of images or data files, a csv, json or parquet file, a name."),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the run.")],
    task: Annotated[
        str | None,
        typer.Option(help="text-classification, text-generation or image-classification."),
    ] = None,
    subset: Annotated[str | None, typer.Option(help="Of the dataset, such as sst2.")] = None,
    split: Annotated[str, typer.Option(help="Of the dataset.")] = "train",
    text: Columns = None,
    label: Annotated[str | None, typer.Option(help="The column of labels.")] = None,
    tokens: Annotated[int, typer.Option(help="Length to which texts are cut.")] = 128,
    alpha: Annotated[float, typer.Option(help="Weight of the outlier loss, 0 to 1.")] = 0.5,
    decay: Annotated[str, typer.Option(help="Of alpha: linear, cosine or constant.")] = "linear",
    balance: Annotated[str, typer.Option(help="none, or initial.")] = "none",
    detach_deviation: Annotated[
        bool, typer.Option("--detach-deviation", help="Hold std(A) constant in the gradient.")
    ] = False,
    include: Patterns = None,
    exclude: Patterns = None,
    steps: Annotated[int, typer.Option(help="Steps of the optimizer.")] = 1000,
    batch_size: Annotated[int, typer.Option(help="Rows of a step.")] = 32,
    learning_rate: Annotated[float, typer.Option(help="Its largest value.")] = 2e-5,
    save_steps: Annotated[int, typer.Option(help="Steps between two checkpoints.")] = 100,
    trainer: Fields = None,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Load and check all; stop.")] = False,
    json: Json = None,
) -> None:
    """Tune a model on your data, in a folder from which a killed run goes on with --resume.

    Example: quanttune tune google-bert/bert-base-uncased --task text-classification
    --data nyu-mll/glue --subset sst2 --steps 2000 --trainer warmup_steps=100 --out sst2
    """
    from .files import write_json

    try:
        from transformers.utils.logging import disable_progress_bar

        from .runs.settings import Settings, fields_of
        from .runs.tuning import tune as run
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f'{error}: pip install "quanttune[tune]"') from error
    disable_progress_bar()  # one for every checkpoint that is written
    tuning: dict[str, Any] = {
        "alpha": alpha,
        "decay": decay,
        "balance": balance,
        "detach_deviation": detach_deviation,
        "include": include or ["*"],
        "exclude": exclude or [],
    }
    settings = Settings(
        model=model, data=data, task=task, subset=subset, split=split, text=tuple(text or ()),
        label=label, tokens=tokens, steps=steps, batch_size=batch_size,
        learning_rate=learning_rate, save_steps=save_steps, seed=seed, tuning=tuning,
        trainer=fields_of(trainer or []),
    )  # fmt: skip
    bar = _progress()
    task_id = bar.add_task("tuning", total=steps)

    def advance(step: int, loss: float) -> None:
        bar.start()
        bar.update(task_id, completed=step, description=f"loss {loss:.4g}")

    try:
        outcome = run(settings, out, resume=resume, dry_run=dry_run, say=_say, progress=advance)
    except KeyboardInterrupt:
        bar.stop()
        again = ["quanttune", *sys.argv[1:], *([] if resume else ["--resume"])]
        _say(f"interrupted. To go on from the newest checkpoint: {shlex.join(again)}")
        raise typer.Exit(130) from None
    finally:
        bar.stop()
    if not dry_run:
        _say(f"the model is in {outcome['model']}")
    if json:
        json.parent.mkdir(parents=True, exist_ok=True)
        write_json(json, outcome)


def _say(line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)


@app.command()
def doctor(json: Json = None) -> None:
    """Print versions, which kernels serve which device and why, and what would mend what is
    missing.

    Example: quanttune doctor
    """
    from .analysis.environment import environment
    from .files import write_json
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
    except (ValueError, ImportError, OSError) as error:
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
