"""The options that several verbs have."""

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

Model = Annotated[str, typer.Argument(help="A folder, a Hugging Face id or a timm name.")]
_DATA = typer.Option(
    help="A folder of images or data files, a csv, json, parquet or txt file, a name."
)
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
    typer.Option(help="Of the dataset.", show_default="validation, or the only one"),
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


def one_of(option: str, value: str, names: Iterable[str], when: str = "") -> None:
    """Refuse a value of an option that is none of its names, before the long work.

    Raises:
        ValueError: it is not; `when` tells where only these names count.
    """
    if value not in (names := list(names)):
        raise ValueError(f"{option} must be one of {', '.join(names)}{when}, got {value!r}")


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

        from ..jobs.settings import Settings
    disable_progress_bar()  # one for every model that is loaded or written
    return Settings(**{**options, "text": tuple(options["text"] or ())})


def measured_settings(
    data: str | None, split: str | None, tokens: int | None, metric: list[str] | None, **others: Any
) -> Any:
    """Return the Settings of what is measured."""
    if tokens is None:
        tokens = 512 if {"last_word", "last_token"} & {*(metric or ())} else 128
    return settings_of(data=data or "", split=split, tokens=tokens, **others)
