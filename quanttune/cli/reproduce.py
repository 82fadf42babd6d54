"""`quanttune reproduce`."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from . import options
from .stopping import say_how_to_go_on
from .terminal import Json, say, showing, writable, write_numbers

WHAT = ("table1", "table3", "table4", "figures")
DEVICES = ("cpu", "cuda")

Value = TypeVar("Value")


def _selection(
    models: Annotated[
        list[str] | None,
        typer.Option(help="Such as deit_tiny; several with commas.", show_default="the table's"),
    ] = None,
    checkpoint: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]MODEL",
            help="A folder, a Hugging Face id or a timm name in place of a model's own weights.",
        ),
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(help="Of table4, such as cola,stsb,mnli_m.", show_default="all nine"),
    ] = None,
    methods: Annotated[
        list[str] | None,
        typer.Option(
            help="Rows, such as minmax,omse,ptq4vit,control,quanttune.", show_default="all rows"
        ),
    ] = None,
    bits: Annotated[list[str] | None, typer.Option(help="Widths.", show_default="8,7,6")] = None,
    alphas: Annotated[
        list[str] | None,
        typer.Option(help="Of QuantTune.", show_default="0.3,0.5,0.7; of figures 0.5"),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many, from 0 on.")] = 1,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read images.")] = 0,
) -> dict[str, Any]:
    """Return the arguments of a Selection; what was not given is left out."""
    names = {"models": models, "tasks": tasks, "methods": methods}
    found: dict[str, Any] = {name: _listed(texts, str) for name, texts in names.items()}
    if bits:
        found["bits"] = _listed(bits, int, "--bits takes whole numbers")
    if alphas:
        found["alphas"] = _listed(alphas, float, "--alphas takes numbers from 0 to 1")
    found["checkpoints"] = _checkpoints(checkpoint or [], found["models"])
    return {**found, "seeds": seeds, "workers": workers}


def _request(
    data: Annotated[
        str,
        typer.Option(
            help="table1: a folder with train/CLASS/*.JPEG and val/CLASS; table3: a file or folder "
            "of texts, or EleutherAI/lambada_openai; table4: a copy of nyu-mll/glue, or its name.",
        ),
    ],
    training_data: Annotated[
        str, typer.Option(help="Other rows to calibrate and tune on.", show_default="--data's")
    ] = "",
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="A trial: no more rows of any part, and short searches."),
    ] = None,
    calibration: Annotated[
        int | None,
        typer.Option(min=1, help="Rows for ranges.", show_default="1000; of texts 320"),
    ] = None,
    epochs: Annotated[
        float | None, typer.Option(help="Of tuning.", show_default="1; table4 3")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="In place of --epochs.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Rows at a time.", show_default="64, 8 or 32")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Of tuning.", show_default="1e-5; table4 2e-5")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest text.", show_default="512; table4 128")
    ] = None,
    random_weights: Annotated[
        bool,
        typer.Option("--random-weights", help="Draw the models: tries all without a download."),
    ] = False,
) -> dict[str, Any]:
    """Return the arguments of a Request, other than the table."""
    if epochs is not None and epochs <= 0:
        raise ValueError(f"--epochs must be above 0, got {epochs}")
    return {
        "data": data, "training_data": training_data, "limit": limit, "calibration": calibration,
        "epochs": epochs, "steps": steps, "batch_size": batch_size,
        "learning_rate": learning_rate, "tokens": tokens, "random_weights": random_weights,
    }  # fmt: skip


@options.grouped(request=_request, selection=_selection)
def run(
    request: dict[str, Any],
    selection: dict[str, Any],
    what: Annotated[str, typer.Argument(help=f"One of {', '.join(WHAT)}.")],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the run.", show_default="WHAT", callback=writable),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda.", show_default="a GPU, if there is one")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Load and check all; stop.")] = False,
    json: Json = None,
) -> None:
    """Measure a table of the paper again, each figure beside the published one.

    A figure that is done is kept, so that a run that was stopped goes on with the next by --resume,
    and one that is finished takes more models, rows, widths and seeds.

    Example: quanttune reproduce table1 --data imagenet --models deit_tiny,vit_base --out table1
    Without weights: quanttune reproduce table1 --data photos --models deit_tiny --limit 64
    --random-weights
    """
    options.one_of("WHAT", what, WHAT)
    _use(device)
    with options.of_extra("demo"):
        import jinja2 as jinja2
        import matplotlib as matplotlib
    with options.of_extra("tune"):
        from ..jobs.reproduce import reproduce
        from ..jobs.reproduction.request import Request, Selection

    folder = out or Path(what)
    try:
        with showing() as progress:
            found = reproduce(
                Request(what, **request), Selection(**selection), folder, resume=resume,
                dry_run=dry_run, say=say, progress=progress,
            )  # fmt: skip
    except KeyboardInterrupt:
        say_how_to_go_on(folder, resume)
        raise typer.Exit(130) from None
    write_numbers(json, found)
    if dry_run:
        say(f"{found['cells']} cells; nothing was measured")
        return
    if what == "figures":
        say(f"{folder}: results.json, report.html")
        return
    say((folder / "table.md").read_text(encoding="utf-8"))
    say(f"{folder}: results.json, table.md, report.html")


def _listed(
    texts: Sequence[str] | None, make: Callable[[str], Value], wanted: str = ""
) -> list[Value]:
    """Return the values of an option that may be repeated, and may have commas."""
    parts = [part.strip() for text in texts or () for part in text.split(",")]
    try:
        return [make(part) for part in dict.fromkeys(parts) if part]
    except ValueError as error:
        raise ValueError(f"{wanted}, got {','.join(parts)!r}") from error


def _checkpoints(texts: Sequence[str], models: Sequence[str]) -> dict[str, str]:
    """Return other weights by the name of the model that they are for."""
    found = {}
    for text in texts:
        name, _, model = text.rpartition("=")
        if not name and len(models) != 1:
            raise ValueError(
                f"--checkpoint {model} is for one model: give it with --models, or NAME={model}"
            )
        found[name or models[0]] = model
    return found


def _use(device: str | None) -> None:
    """Choose a device, before anything asks for one."""
    if device is None:
        return
    options.one_of("--device", device, DEVICES)
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch

    if torch.cuda.is_available() != (device == "cuda"):
        raise ValueError(f"--device {device}: PyTorch sees {'a' if device == 'cpu' else 'no'} GPU")
