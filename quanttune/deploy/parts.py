"""The files of a model with keys and values as inputs and outputs, and what is in each."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from . import encoder_decoder, past
from .dimensions import Dynamic
from .encoder_decoder import decoder_alone, encoder_alone, has_two_parts


class Part(NamedTuple):
    """A file, and what of a model is in it."""

    file: str  # its name in the folder; "" where it is the only one
    called: Callable[..., AbstractContextManager[None]]  # lets the model compute what is in it
    example: Callable[[Any, nn.Module], dict[str, Tensor]]  # a call to trace it with, of a batch
    dimensions: Dynamic


DECODER_ONLY = Part("", past.with_past, past.example, past.dimensions)
ENCODER = Part(
    "encoder_model.onnx",
    encoder_alone,
    encoder_decoder.encoder_call,
    encoder_decoder.encoder_dimensions,
)
DECODER = Part(
    "decoder_model_merged.onnx",
    decoder_alone,
    encoder_decoder.decoder_example,
    encoder_decoder.decoder_dimensions,
)


def parts_of(model: nn.Module) -> tuple[Part, ...]:
    """Return the files that a model is written to with keys and values.

    Raises:
        ValueError: it is an encoder-decoder that none can be made of.
    """
    if not has_two_parts(model):
        return (DECODER_ONLY,)
    encoder_decoder.check_parts(model)
    return ENCODER, DECODER


def part_files(folder: Path) -> dict[Part, Path]:
    """Return the files of an encoder-decoder's folder."""
    return {part: folder / part.file for part in (ENCODER, DECODER)}


@contextmanager
def traceable(
    model: nn.Module, batch: Any, part: Part | None
) -> Iterator[tuple[Any, list[str] | None]]:
    """Yield an example to trace a part of a model with, and the names of its inputs.

    Meanwhile the model computes that part. Without one it stays as it is, and so does the batch.
    """
    if part is None:
        yield batch, None
        return
    example = part.example(batch, model)
    with part.called(model, list(example)):
        yield {past.identifier(name): x for name, x in example.items()}, list(example)
