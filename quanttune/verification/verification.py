"""Check that an ONNX file computes what the quantized model simulates."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..export.caches import without_caches
from ..export.requirements import check_model
from ..inference.onnx_model import read
from ..quantization.passes import evaluating
from .agreement import Distance, Layer
from .identity import check_description


@dataclass(frozen=True)
class Output:
    """An output of the file, and of the simulation with a little noise, beside the simulation's."""

    name: str
    magnitude: float  # of the simulation's largest value
    file: Distance
    noise: Distance
    same_codes: Distance  # of the first batch's, where each layer took the simulation's codes


@dataclass(frozen=True)
class Verification:
    """What `verify` found; prints as a table."""

    model: str
    layers: tuple[Layer, ...]  # in the order in which they are computed
    outputs: tuple[Output, ...]
    merged: tuple[str, ...]  # sites whose codes the file takes from another one's
    unused: tuple[str, ...]  # sites that no output needs, which the file leaves out
    floats: tuple[str, ...]  # sites of more than 8 bits, which the file computes in float
    problems: tuple[str, ...]  # sentences; the first may be the cause of others

    @property
    def passed(self) -> bool:
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {"passed": self.passed, **asdict(self)}

    def __str__(self) -> str:
        from .table import table

        return table(self)


def verify(path: str | Path, model: nn.Module, data: Iterable[Any]) -> Verification:
    """Compare an ONNX file, run by ONNX Runtime on the CPU, with the model that it was made from.

    First what the file holds: scales, zero points and tensors must be the model's. Then layer by
    layer, on the first batch: the file is cut where it rounds, each part is given the codes of the
    simulation, and must make the codes of the simulation, but for values near the border of two.
    Such flips compound with depth, so the whole file is judged on all batches beside a control: the
    simulation with a little noise on everything that it rounds.

    Args:
        path: what `export_onnx` wrote.
        model: what was exported, or the same one loaded again.
        data: batches of inputs, as `quantize` takes them. The codes of all sites for the first are
            held at once, a byte per value, twice.

    Raises:
        ValueError: there is nothing to compare: the file is not whole or of another model, the
            model is not ready for export, data is empty. What merely disagrees is in the result.
        FileNotFoundError: there is no file.
    """
    path = Path(path)
    check_model(model)
    file = read(path)
    check_description(model, file, path)
    from .comparison import compare  # needs onnx

    with evaluating(model), without_caches(model), torch.no_grad():
        return Verification(type(model).__name__, **compare(path, file, model, data))
