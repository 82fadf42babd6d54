"""Whether files answer as their models do; timing one that does not would say nothing."""

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from ...quantization.caches import without_caches
from ..onnx_model import OnnxModel
from ..parts import Part
from ..tracing import outputs_by_name
from .verify import verify

CLOSE = 1e-4  # of an output's mean: float kernels differ by less


def check_answers(
    floating: Path,
    integer: Path,
    model: nn.Module,
    quantized: nn.Module,
    batch: Mapping[str, Tensor],
) -> None:
    """Refuse files whose answers are not those of the models that they were made from.

    Raises:
        ValueError: the first output of the float file that differs, or the first problem that
            `verify` finds.
    """
    check_float(floating, model, batch)
    check_integer(integer, quantized, batch)


@torch.no_grad()
def check_float(
    file: Path, model: nn.Module, call: Mapping[str, Tensor], part: Part | None = None
) -> None:
    """Judge each output of a float file by its mean difference from the model's.

    part: of an encoder-decoder, which the file holds.

    Raises:
        ValueError: the first output that differs.
    """
    with without_caches(model), part.called(model) if part else nullcontext():
        expected = outputs_by_name(model(**call))
    answers = OnnxModel(file)(**call)
    for name, wanted in expected.items():
        error, limit = (answers[name] - wanted).abs().mean(), CLOSE * wanted.abs().mean()
        if not error <= limit:  # nor is NaN
            raise ValueError(
                f"{file} is not timed, for its answers are wrong: {name} is {error:.2g} away "
                f"from the model's on average, at most {limit:.2g} was expected"
            )


def check_integer(file: Path, quantized: nn.Module, batch: Mapping[str, Tensor]) -> None:
    """Refuse a file, or folder, that `verify` finds a problem in.

    Raises:
        ValueError: the first problem.
    """
    found = verify(file, quantized, [batch])
    if found.problems:
        raise ValueError(
            f"{file} is not timed, for it is not what the model simulates: {found.problems[0]}"
        )
