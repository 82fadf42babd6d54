"""The options that several verbs have."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

Model = Annotated[str, typer.Argument(help="A folder, a Hugging Face id or a timm name.")]
_DATA = typer.Option(help="A folder of images or data files, a csv, json or parquet file, a name.")
Data = Annotated[str, _DATA]
OptionalData = Annotated[str | None, _DATA]
Task = Annotated[
    str | None,
    typer.Option(help="text-classification, text-generation or image-classification."),
]
Subset = Annotated[str | None, typer.Option(help="Of the dataset, such as sst2.")]
Split = Annotated[str, typer.Option(help="Of the dataset.")]
Columns = Annotated[list[str] | None, typer.Option(help="A column; twice for pairs of texts.")]
Label = Annotated[str | None, typer.Option(help="The column of labels.")]
Tokens = Annotated[int, typer.Option(help="Length to which texts are cut.")]
MeasuredSplit = Annotated[
    str | None,
    typer.Option(help="Of the dataset; of a file its rows.", show_default="validation"),
]
MeasuredTokens = Annotated[
    int | None,
    typer.Option(help="Length to which texts are cut.", show_default="128; of last words 512"),
]
Metrics = Annotated[
    list[str] | None,
    typer.Option(
        help="accuracy, f1 or matthews_correlation; perplexity, last_word or last_token. "
        "Repeat for several.",
        show_default="accuracy or perplexity, or GLUE's of its subset",
    ),
]
BatchSize = Annotated[int, typer.Option(help="Rows at a time.")]
Seed = Annotated[int, typer.Option(help="Of everything random.")]


def refuse_given(context: typer.Context, names: Collection[str], where: str) -> None:
    """Refuse options that would have no effect.

    Raises:
        ValueError: one of `names` was given; `where` says when it counts.
    """
    for name in names:
        source = context.get_parameter_source(name)
        if source and source.name == "COMMANDLINE":
            raise ValueError(f"--{name.replace('_', '-')} has an effect {where} only")


@contextmanager
def of_extra(name: str) -> Iterator[None]:
    """Say what to install if an import fails."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f'{error}: pip install "quanttune[{name}]"') from error


def settings_of(**options: Any) -> Any:
    """Return the Settings of options, and say what to install if it is missing."""
    with of_extra("tune"):
        from transformers.utils.logging import disable_progress_bar

        from ..runs.settings import Settings
    disable_progress_bar()  # one for every model that is loaded or written
    return Settings(**{**options, "text": tuple(options["text"] or ())})


def measured_settings(
    data: str | None, split: str | None, tokens: int | None, metric: list[str] | None, **others: Any
) -> Any:
    """Return the Settings of what is measured; validation rows are, and of a file all."""
    if split is None:
        # datasets calls the rows of a file so
        split = "train" if data and Path(data).is_file() else "validation"
    if tokens is None:
        tokens = 512 if {"last_word", "last_token"} & {*(metric or ())} else 128
    return settings_of(data=data or "", split=split, tokens=tokens, **others)
