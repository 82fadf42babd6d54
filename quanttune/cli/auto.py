"""`quanttune auto`."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from ..choosing.judge import allowed_drop
from ..choosing.targets import TARGETS
from ..progress import Progress
from . import options
from .stopping import say_how_to_go_on, stopping
from .terminal import Json, say, showing, write_numbers

NOT_MET = 3  # the status of a drop that could not be met
ADVICE = (
    "With --resume and more --minutes the search goes on; quanttune tune --recipe trains outliers "
    "away, and quanttune auto takes what it writes"
)


def _request(
    target: Annotated[str, typer.Option(help=f"What runs it: {', '.join(TARGETS)}.")] = "onnx-cpu",
    drop: Annotated[
        str, typer.Option(help="How much of the metric may be lost: '1%' of it, or an amount.")
    ] = "1%",
    learning_split: Annotated[
        str, typer.Option(help="Of the dataset; ranges are taken from its rows.")
    ] = "train",
    test_split: Annotated[
        str | None,
        typer.Option(help="Of the dataset.", show_default="half of the rows of --split"),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Rows for ranges and methods.")] = 320,
    refit_rows: Annotated[int, typer.Option(min=1, help="Rows for a refit.")] = 640,
    rows: Annotated[
        int, typer.Option(min=8, help="Rows of validation, and of test, at most.")
    ] = 512,
    bits: Annotated[int, typer.Option(help="Of activations and weights, 2 to 16.")] = 8,
    weight_bits: Annotated[int | None, typer.Option(help="Of weights, if others.")] = None,
) -> dict[str, Any]:
    """Check the arguments of a Request, and return them."""
    options.one_of("--target", target, TARGETS)
    allowed_drop(drop, 1.0)
    return {
        "target": target, "drop": drop, "learning_split": learning_split, "test_split": test_split,
        "limit": limit, "refit_rows": refit_rows, "rows": rows, "bits": bits,
        "weight_bits": weight_bits,
    }  # fmt: skip


@options.grouped(settings=options.measured_dataset, request=_request)
def run(
    context: typer.Context,
    settings: Any,
    request: dict[str, Any],
    out: Annotated[Path, typer.Option(help="Folder of the run.")],
    model: Annotated[
        str | None, typer.Argument(help="A folder, a Hugging Face id or a timm name.")
    ] = None,
    metric: options.Metrics = None,
    minutes: Annotated[float, typer.Option(min=0, help="For the search.")] = 20.0,
    recipe: Annotated[
        Path | None, typer.Option(help="A recipe.json to do again, instead of a search.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Read the data; stop.")] = False,
    json: Json = None,
) -> None:
    """Choose by trying how to quantize a model for a runtime; write the model and its file.

    Nothing is trained. What is chosen by are validation rows, other rows say at the end what it is
    worth. Ctrl-C ends the search with the best so far; its status is 3 if the drop is not met, 1 if
    the file computes something else than the model.

    Example: quanttune auto sst2/model --data nyu-mll/glue --subset sst2 --target onnx-npu --out npu
    Again: quanttune auto --recipe npu/recipe.json --out again
    """
    _check(context, model, settings.data, recipe)
    with options.of_extra("deploy"):
        import onnxruntime as onnxruntime
    with options.of_extra("tune"):
        from ..jobs.auto import auto, repeat
        from ..jobs.auto_rows import request_of

    try:
        with showing() as progress, _searching(progress) as advance:
            if recipe:
                found = repeat(recipe, out, say=say, progress=advance)
            else:
                found = auto(
                    settings, request_of(settings, metric or (), request), out, minutes=minutes,
                    resume=resume, dry_run=dry_run, say=say, progress=advance,
                )  # fmt: skip
    except KeyboardInterrupt:
        say_how_to_go_on(out, resume)
        raise typer.Exit(130) from None
    write_numbers(json, found)
    if not dry_run:
        _print(found, out)


def _check(context: typer.Context, model: str | None, data: str, recipe: Path | None) -> None:
    """Refuse what does not go together."""
    if recipe:
        given = [
            name
            for name in context.params
            if name not in ("recipe", "out", "json")
            and (source := context.get_parameter_source(name))
            and source.name == "COMMANDLINE"
        ]
        if given:
            raise ValueError(
                f"--recipe has model, data and all settings in its file: leave out {given[0]}"
            )
    elif not (model and data):
        raise ValueError("give a model and --data, or --recipe")


@contextmanager
def _searching(progress: Progress) -> Iterator[Progress]:
    """Yield a progress whose first Ctrl-C ends the search and not the run."""
    with stopping("the search ends here, with the best so far") as stop:
        interrupted = False

        def advance(what: str, done: int, total: int | None) -> None:
            nonlocal interrupted
            progress(what, done, total)
            if not interrupted:
                try:
                    stop()
                except KeyboardInterrupt:
                    interrupted = True
                    raise

        yield advance


def _print(found: dict[str, Any], out: Path) -> None:
    verdict, file = found["verdict"], found["file"]
    for line in verdict["words"]:
        say(line)
    size = f"{file['file']} ({file['bytes'] / 1e6:.1f} MB), " if file["bytes"] else ""
    say(f"{out}: model, {size}recipe.json, report.html")
    if file["problems"]:
        say(f"{file['file']} fails: {file['problems'][0]}")
        raise typer.Exit(1)
    if not verdict["met"]:
        say(f"the drop is not met: {found['ended']}. {ADVICE}")
        raise typer.Exit(NOT_MET)
