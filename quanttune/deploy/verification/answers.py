"""Whether files answer as their models do; timing one that does not would say nothing."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ...quantization.running import in_float
from ..caches import without_caches
from ..onnx_model import OnnxModel
from ..tracing import outputs_by_name

CLOSE = 1e-4  # of an output's mean: float kernels differ by less
# what two roundings of one output are apart if their errors are independent, with a margin
APART = 1.1 * 2**0.5


@torch.no_grad()
def check_answers(
    floating: Path,
    integer: Path,
    model: nn.Module,
    quantized: nn.Module,
    batch: Mapping[str, Tensor],
) -> None:
    """Refuse files whose answers are not those of the models that they were made from.

    Each output is judged by its mean difference. The integer file may be as far from the simulation
    as another rounding of what it simulates is: where one code flips, others do behind it.

    Raises:
        ValueError: the first output that differs.
    """
    with without_caches(model), without_caches(quantized):
        exact, simulated = outputs_by_name(model(**batch)), outputs_by_name(quantized(**batch))
        with in_float(quantized):  # the model may lack what a method put there
            unrounded = outputs_by_name(quantized(**batch))
    close = {name: CLOSE * x.abs().mean() for name, x in exact.items()}
    _check(floating, batch, exact, close, "the model")
    apart = {name: APART * (simulated[name] - x).abs().mean() for name, x in unrounded.items()}
    _check(integer, batch, simulated, apart, "the simulation")


def _check(
    path: Path,
    batch: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    limits: Mapping[str, Tensor],
    owner: str,
) -> None:
    answers = OnnxModel(path)(**batch)
    for name, wanted in expected.items():
        error = (answers[name] - wanted).abs().mean()
        if not error <= limits[name]:  # nor is NaN
            raise ValueError(
                f"{path} is not timed, for its answers are wrong: {name} is {error:.2g} away from "
                f"{owner}'s on average, at most {limits[name]:.2g} was expected"
            )
