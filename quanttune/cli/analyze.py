"""`quanttune analyze`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ..jobs.settings import Settings
from ..quantization.coverage import PRESETS
from . import options
from .terminal import Json, progress_bar, say, writable, write_numbers, written

OF_DATA = (
    "task", "subset", "split", "text", "label", "tokens", "rows", "limit", "batch_size",
)  # fmt: skip


def _request(
    bits: Annotated[int, typer.Option(help="Of weights and activations.")] = 8,
    coverage: Annotated[str, typer.Option(help="What is quantized.")] = "full_no_softmax",
    site: Annotated[
        list[str] | None, typer.Option(help="A tensor whose channels are drawn (Fig. 2).")
    ] = None,
) -> Any:
    from ..analysis.subject import Request

    options.one_of("--coverage", coverage, PRESETS)
    return Request(bits=bits, coverage=coverage, sites=site or ())


@options.grouped(settings=options.dataset, request=_request)
def run(
    context: typer.Context,
    settings: Settings | None,
    request: Any,
    model: Annotated[
        str | None,
        typer.Argument(
            help="A folder, a Hugging Face id or a timm name; without --data a recipe (minilm or "
            "digits), or an encoder.",
            show_default="minilm",
        ),
    ] = None,
    data: options.Data = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows that ranges are taken from.")] = 100,
    limit: Annotated[int, typer.Option(min=1, help="Rows that quality is measured on.")] = 400,
    compare: Annotated[
        list[str] | None,
        typer.Option(help="Another model, such as the tuned one; or an arm of the recipe."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the report.", callback=writable)] = Path(
        "analysis"
    ),
    seed: options.Seed = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Load and check all; stop.")] = False,
    json: Json = None,
) -> None:
    """Find out why a model is hard to quantize: Figs. 2 to 6 of the paper, for your model.

    Without --data the rows are those of the recipe, or of minilm's for another encoder.

    Example: quanttune analyze minilm --compare detached --out analysis
    """
    from ..analysis.analysis import analyze, units
    from ..analysis.survey import rows_of
    from ..report.report import write_report

    if (out / "analysis.json").exists():
        raise ValueError(f"{out} holds an analysis: choose another --out")
    if settings is None:
        options.refuse_given(context, OF_DATA, "with --data")
        from ..demo.analyze import recipe_subject

        subject, others = recipe_subject(model, compare or [], seed)
    elif model is None:
        raise ValueError("--data needs a model: quanttune analyze MODEL --data DATA")
    else:
        from ..jobs.analyze import load_subject

        subject, others = load_subject(settings, compare or [], rows=rows, limit=limit, say=say)
    if dry_run:
        names = ", ".join([subject.name, *others])
        say(f"{names}: {sum(map(rows_of, subject.data))} rows; the report goes to {out}")
        return
    with progress_bar() as progress:
        bar = progress.add_task("calibrating", total=round(units(request, 1 + len(others))))

        def advance(description: str, done: float) -> None:
            progress.update(bar, description=description, advance=done)

        found = analyze(subject, request, others, advance)
    written.append(out)
    files = write_report(found, out, "analysis.json")
    write_numbers(json, found)
    say(f"{found['seconds']:.0f} s. Written: {', '.join(map(str, files))}")
