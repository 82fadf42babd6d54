"""The options that several verbs have."""

from typing import Annotated, Any

import typer

Model = Annotated[str, typer.Argument(help="A folder, a Hugging Face id or a timm name.")]
Data = Annotated[
    str,
    typer.Option(help="A folder of images or data files, a csv, json or parquet file, a name."),
]
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


def settings_of(**options: Any) -> Any:
    """Return the Settings of options, and say what to install if it is missing."""
    try:
        from transformers.utils.logging import disable_progress_bar

        from ..runs.settings import Settings
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f'{error}: pip install "quanttune[tune]"') from error
    disable_progress_bar()  # one for every model that is loaded or written
    return Settings(**{**options, "text": tuple(options["text"] or ())})
