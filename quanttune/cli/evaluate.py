"""`quanttune evaluate`."""

from typing import Annotated, Any

import typer

from ..jobs.settings import Settings
from . import options
from .terminal import Json, say, showing, write_numbers

OF_DATA = ("subset", "split", "text", "label", "metric", "tokens", "seed")


@options.grouped(settings=options.measured_dataset)
def run(
    context: typer.Context,
    settings: Settings,
    lm_eval: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TASK",
            help="Instead of data, a task of lm_eval, or a YAML file of one. Repeat for several.",
        ),
    ] = None,
    metric: options.Metrics = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Rows, drawn by the seed; of lm_eval's tasks the first."),
    ] = None,
    json: Json = None,
) -> None:
    """Measure a model on your data; one that is quantized beside its own weights in float.

    Where a method rounded the weights, there are no float ones, and it is measured alone.

    last_word and last_token are LAMBADA's: how often every token of a text's last word, or its
    last token alone, is the likeliest one.

    The metrics of GLUE and LAMBADA are times 100, those of lm_eval are as it gives them.

    Example: quanttune evaluate sst2-w8a8 --data nyu-mll/glue --subset sst2 --limit 500
    """
    if bool(settings.data) == bool(lm_eval):
        raise ValueError("give what the model is measured on: either --data or --lm-eval")
    if lm_eval:
        options.refuse_given(context, OF_DATA, "with --data")
        with options.of_extra("eval"):
            from ..jobs.lm_eval_tasks import evaluate_tasks

        outcome = evaluate_tasks(settings, lm_eval, limit=limit, say=say)
    else:
        with options.of_extra("tune"):
            from ..jobs.evaluate import evaluate

        with showing() as progress:
            outcome = evaluate(
                settings, metrics=metric or (), limit=limit, say=say, progress=progress
            )
    _print(outcome)
    write_numbers(json, outcome)


def _print(outcome: dict[str, Any]) -> None:
    """Print a line for each number, in float and, of a quantized model, beside it."""
    columns = {"float": outcome["float"]} if outcome["float"] else {}
    if scheme := outcome["quantization"]:
        widths = f"W{scheme['weight_bits'] or scheme['bits']}A{scheme['bits']}"
        how = ", ".join([widths, scheme["coverage"], *scheme["methods"]])
        columns[f"quantized ({how})"] = outcome["quantized"]
    rows, names = f"{outcome['rows']} rows", next(iter(columns.values()))
    width = max(map(len, [rows, *names]))
    say("  ".join([rows.ljust(width), *(head.rjust(10) for head in columns)]))
    for name in names:
        numbers = (f"{column[name]:10.6g}" for column in columns.values())
        say("  ".join([name.ljust(width), *numbers]))
