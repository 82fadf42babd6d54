"""The options that several verbs have."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
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
