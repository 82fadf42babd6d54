"""QERA: what rounding takes from a weight, given back as a product of low rank in float."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from ..correction import add_correction
from .rounding.layer_by_layer import LayerByLayer
from .rounding.layers import Layer
from .rounding.moments import Group, Moments, rows_of

SMALLEST = 1e-12  # of second moments, in units of the largest: a direction that inputs do not have


class InputSums(Moments):
    """Second moments of inputs, and the sums of their magnitudes."""

    def __init__(self, width: int, device: torch.device) -> None:
        super().__init__(width, device)
        self.magnitudes = torch.zeros(width, dtype=torch.float64, device=device)

    def add(self, x: Tensor, rounded: Tensor) -> None:
        super().add(x, rounded)
        self.magnitudes += rows_of(rounded).abs().sum(0)


@dataclass(frozen=True)
class QERA(LayerByLayer):
    """Round Linear and Conv1D weights to nearest, and add a product of low rank in float.

    It is the one of its rank that brings outputs on `data` nearest to those of the float weight,
    or, with another `weighting`, what other methods take for it. A layer is given what the layers
    before it, already rounded and corrected, make of the data. Convolutions, embeddings and tied
    weights are rounded to nearest alone.

    The products are floats: no export writes them, and nothing but this library computes them.

    Args:
        rank: of the added product, which holds rank * (inputs + outputs) numbers.
        weighting: of weights' errors by their inputs: "exact", by all second moments; "diagonal",
            by those of each channel alone (QERA-approx); "magnitude", by mean |x| (LQER); or
            "none" (ZeroQuant-V2's plain SVD).

    Raises:
        ValueError: an option is out of range, or no layer is reached.

    Source: Zhang et al., QERA, arXiv 2410.06040; LQER, arXiv 2402.02446; ZeroQuant-V2, arXiv
    2303.08302.
    """

    name = "qera"
    sums = InputSums
    rank: int = 32
    weighting: str = "exact"

    def __post_init__(self) -> None:
        if self.weighting not in WEIGHTINGS:
            known = ", ".join(WEIGHTINGS)
            raise ValueError(f"weighting must be one of {known}, got {self.weighting!r}")
        if type(self.rank) is not int or self.rank < 1:
            raise ValueError(f"rank must be a whole number from 1, got {self.rank!r}")

    def round_group(self, group: Group, sums: InputSums) -> None:
        weights = WEIGHTINGS[self.weighting](sums)
        for layer in group.layers:
            self._round_layer(layer, *weights)

    def _round_layer(self, layer: Layer, root: Tensor, inverse: Tensor) -> None:
        rows = layer.rows
        layer.write(rows, layer.grid(rows))
        down, up = low_rank(rows - layer.rows, root, inverse, self.rank)
        add_correction(layer.module, down, up)


def low_rank(errors: Tensor, root: Tensor, inverse: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return (rank, inputs) and (outputs, rank), whose product is nearest to errors @ root, times
    its inverse; float64.

    Both factors of a rank reach as far, so that half precision holds them: the inverse has large
    numbers where inputs have little.
    """
    left, values, right = torch.linalg.svd(errors @ root, full_matrices=False)
    down, up = right[:rank] @ inverse, left[:, :rank] * values[:rank]
    ends = down.abs().amax(1), up.abs().amax(0)
    balance = (ends[1] / ends[0]).sqrt()
    balance = torch.where((balance > 0) & balance.isfinite(), balance, 1.0)
    return down * balance[:, None], up / balance


def _exact(sums: InputSums) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(sums.of_inputs / sums.tokens)
    root = _positive(values).sqrt()
    return vectors * root @ vectors.T, vectors / root @ vectors.T


def _diagonal(sums: InputSums) -> tuple[Tensor, Tensor]:
    return _of_channels((sums.of_inputs.diagonal() / sums.tokens).sqrt())


def _magnitude(sums: InputSums) -> tuple[Tensor, Tensor]:
    return _of_channels(sums.magnitudes / sums.tokens)


def _none(sums: InputSums) -> tuple[Tensor, Tensor]:
    return _of_channels(torch.ones_like(sums.magnitudes))


def _of_channels(root: Tensor) -> tuple[Tensor, Tensor]:
    root = _positive(root.square()).sqrt()
    return root.diag(), (1 / root).diag()


def _positive(moments: Tensor) -> Tensor:
    """Return second moments without those that are 0, or next to it; ones, if all inputs are 0."""
    largest = float(moments.max())
    return moments.clamp_min(SMALLEST * largest) if largest > 0 else torch.ones_like(moments)


WEIGHTINGS: Mapping[str, Callable[[InputSums], tuple[Tensor, Tensor]]] = MappingProxyType(
    {"exact": _exact, "diagonal": _diagonal, "magnitude": _magnitude, "none": _none}
)
