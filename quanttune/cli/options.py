"""The options that several verbs have."""

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from inspect import Parameter, Signature, signature
from typing import Annotated, Any

import typer

from ..jobs.settings import Settings

Model = Annotated[str, typer.Argument(help="A folder, a Hugging Face id or a timm name.")]
Data = Annotated[
    str | None,
    typer.Option(
        help="A folder of images or data files, a csv, json, parquet or txt file, a name."
    ),
]
Task = Annotated[
    str | None,
    typer.Option(
        help="text-classification, text-generation, text2text-generation or image-classification."
    ),
]
Subset = Annotated[str | None, typer.Option(help="Of the dataset, such as sst2.")]
Split = Annotated[str | None, typer.Option(help="Of the dataset.")]
Columns = Annotated[list[str] | None, typer.Option(help="A column; twice for pairs of texts.")]
Label = Annotated[str | None, typer.Option(help="The column of labels, or texts to be written.")]
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
        help="accuracy, f1 or matthews_correlation; perplexity, last_word or last_token; "
        "exact_match, bleu or word_error_rate. Repeat for several.",
        show_default="accuracy, perplexity or exact_match, or GLUE's of its subset",
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


def granularity(weights: str) -> str | int:
    """Return what --weights asks for: a scale for each channel, or one, or the size of groups.

    Raises:
        ValueError: it is none of these.
    """
    if weights.isdecimal():
        return int(weights)
    one_of("--weights", weights, ("channel", "tensor", "128"))
    return weights


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


def grouped(**makers: Callable[..., Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a verb the options that functions take, and hand it what they make of them, by name.

    In --help those that must be given stand first. Where the verb states one of a function's
    options itself, its default and help count, and both get it.
    """

    def decorate(run: Callable[..., None]) -> Callable[..., None]:
        groups = {name: signature(make, eval_str=True).parameters for name, make in makers.items()}
        own = dict(signature(run, eval_str=True).parameters)
        for name in makers:
            del own[name]

        @wraps(run)
        def verb(**given: Any) -> None:
            made = {
                name: makers[name](**{option: given[option] for option in group})
                for name, group in groups.items()
            }
            run(**made, **{option: given[option] for option in own})

        options: dict[str, Parameter] = {}
        for group in (*groups.values(), own):
            options.update(group)
        ordered = sorted(options.values(), key=lambda option: option.default is not option.empty)
        verb.__signature__ = Signature(ordered)  # type: ignore[attr-defined]
        return verb

    return decorate


def dataset(
    model: Model,
    data: Data,
    task: Task = None,
    subset: Subset = None,
    split: Split = "train",
    text: Columns = None,
    label: Label = None,
    tokens: Tokens = 128,
    batch_size: BatchSize = 32,
    seed: Seed = 0,
) -> Any:
    """Return the Settings of a model and its rows; None for a verb that was given no data."""
    if data is None:
        return None
    with of_extra("tune"):
        from transformers.utils.logging import disable_progress_bar
    disable_progress_bar()  # one for every model that is loaded or written
    return Settings(
        model, data, task, subset, split, tuple(text or ()), label, tokens,
        batch_size=batch_size, seed=seed,
    )  # fmt: skip


def measured_dataset(
    model: Model,
    data: Data = None,
    task: Task = None,
    subset: Subset = None,
    split: MeasuredSplit = None,
    text: Columns = None,
    label: Label = None,
    metric: Metrics = None,
    tokens: MeasuredTokens = None,
    batch_size: BatchSize = 32,
    seed: Seed = 0,
) -> Any:
    """Return the Settings of a model and rows that it is measured on."""
    if tokens is None:
        tokens = 512 if {"last_word", "last_token"} & {*(metric or ())} else 128
    return dataset(model, data or "", task, subset, split, text, label, tokens, batch_size, seed)
