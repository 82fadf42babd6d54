"""`quanttune evaluate`."""

from pathlib import Path
from typing import Annotated

import typer

from . import options
from .terminal import Json, say, showing, write_numbers


def run(
    model: options.Model,
    data: options.Data,
    task: options.Task = None,
    subset: options.Subset = None,
    split: Annotated[
        str | None,
        typer.Option(help="Of the dataset; of a file its rows.", show_default="validation"),
    ] = None,
    text: options.Columns = None,
    label: options.Label = None,
    tokens: options.Tokens = 128,
    limit: Annotated[int | None, typer.Option(min=1, help="Rows, drawn by the seed.")] = None,
    batch_size: options.BatchSize = 32,
    seed: options.Seed = 0,
    json: Json = None,
) -> None:
    """Measure a model on your data; one that is quantized beside its own weights in float.

    Accuracy of classification, perplexity of text generation.

    Example: quanttune evaluate sst2-w8a8 --data nyu-mll/glue --subset sst2 --limit 500
    """
    if split is None:
        split = (
            "train" if Path(data).is_file() else "validation"
        )  # datasets names rows of a file so
    settings = options.settings_of(
        model=model, data=data, task=task, subset=subset, split=split, text=text, label=label,
        tokens=tokens, batch_size=batch_size, seed=seed,
    )  # fmt: skip
    from ..runs.evaluation import evaluate

    with showing() as progress:
        outcome = evaluate(settings, limit=limit, say=say, progress=progress)
    say(f"{outcome['metric']} of {outcome['rows']} rows:")
    say(f"  float      {outcome['float']:.6g}")
    if scheme := outcome["quantization"]:
        widths = f"W{scheme['weight_bits'] or scheme['bits']}A{scheme['bits']}"
        say(f"  quantized  {outcome['quantized']:.6g}  ({widths}, {scheme['coverage']})")
    write_numbers(json, outcome)
