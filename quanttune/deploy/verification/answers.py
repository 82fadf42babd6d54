"""Whether files answer as their models do; timing one that does not would say nothing."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..caches import without_caches
from ..onnx_model import OnnxModel
from ..tracing import outputs_by_name
from .verify import verify

CLOSE = 1e-4  # of an output's mean: float kernels differ by less


@torch.no_grad()
def check_answers(
    floating: Path,
    integer: Path,
    model: nn.Module,
    quantized: nn.Module,
    batch: Mapping[str, Tensor],
) -> None:
    """Refuse files whose answers are not those of the models that they were made from.

    Each output of the float file is judged by its mean difference, the integer file by `verify`.

    Raises:
        ValueError: the first output that differs, or the first problem.
    """
    with without_caches(model):
        expected = outputs_by_name(model(**batch))
    answers = OnnxModel(floating)(**batch)
    for name, wanted in expected.items():
        error, limit = (answers[name] - wanted).abs().mean(), CLOSE * wanted.abs().mean()
        if not error <= limit:  # nor is NaN
            raise ValueError(
                f"{floating} is not timed, for its answers are wrong: {name} is {error:.2g} away "
                f"from the model's on average, at most {limit:.2g} was expected"
            )
    found = verify(integer, quantized, [batch])
    if found.problems:
        raise ValueError(
            f"{integer} is not timed, for it is not what the model simulates: {found.problems[0]}"
        )
