"""What factors of channels cost, tried on tokens of the data."""

from functools import partial
from typing import Any

from torch import Tensor, nn

from ....fake_quantizer import dynamic_fake_quant
from ...scheme import Scheme
from .pairs import Pair


class Trial:
    """The error of the Linear modules of one pair, on min-max grids as a scheme has them."""

    def __init__(self, pair: Pair, rows: Tensor, scheme: Scheme) -> None:
        self._rows = rows
        self._readers = [
            (columns.to(rows), rows @ columns.to(rows).T, *_roundings(name, scheme, rows))
            for name, columns in zip(pair.readers, pair.columns(), strict=True)
        ]

    def error(self, scale: Tensor) -> float:
        """Return the squared error of all outputs, where channels are divided by `scale`."""
        rows = self._rows / scale
        return sum(
            float((round_input(rows) @ round_weight(columns * scale).T - wanted).square().sum())
            for columns, wanted, round_input, round_weight in self._readers
        )


def _roundings(name: str, scheme: Scheme, rows: Tensor) -> tuple[Any, nn.Module]:
    """Return how a module's input and its weight, as (outputs, inputs), will be rounded."""
    quantizer = scheme.activation_quantizer(f"{name}.input_quantizer", "input", rows.device)
    bits = getattr(quantizer, "bits", None)  # None where it stays in float
    round_input = nn.Identity() if bits is None else partial(dynamic_fake_quant, bits=bits)
    return round_input, scheme.weight_quantizer(f"{name}.weight_quantizer", 0, rows.shape[1])
