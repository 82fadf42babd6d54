"""GPTQ: round column by column, and let the columns that follow make up for each error."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...progress import track
from ..running import Data
from ..scheme import Scheme
from .rounding.fisher import fishers_of
from .rounding.layer_by_layer import LayerByLayer
from .rounding.layers import Grid, Layer
from .rounding.linear_systems import damped_factor
from .rounding.moments import Group, Moments, groups_of, passes

BLOCK = 128  # columns whose errors reach those behind them in one product


@dataclass(frozen=True)
class GPTQ(LayerByLayer):
    """Round Linear and Conv1D weights one column after the other.

    What a column loses is made up for by those that are still float, so that the layer's output
    on `data` changes the least. A layer is given what the layers before it, already rounded, make
    of the data; it is the rounded input that counts. Grids are min-max of the float weights.
    Convolutions, embeddings and tied weights are rounded to nearest; so are columns that no token
    reaches, which the official code makes zero.

    Args:
        hessian: what is to change the least: "inputs", the layer's output; or "fisher", the
            model's, to first order, with each layer in the float model (see fishers_of).
        damping: of the inputs' second moments, in units of their mean diagonal. Ten times more is
            tried up to three times where they cannot be inverted.
        act_order: take columns in the order of their inputs' energy, the largest first.

    Raises:
        ValueError: an option is unknown, second moments cannot be inverted, or no layer is reached.

    Source: Frantar et al., GPTQ, arXiv 2210.17323.
    """

    name = "gptq"
    hessian: str = "inputs"
    damping: float = 0.01
    act_order: bool = False

    def __post_init__(self) -> None:
        if self.hessian not in ("inputs", "fisher"):
            raise ValueError(f"hessian must be inputs or fisher, got {self.hessian!r}")

    def apply(self, model: nn.Module, scheme: Scheme, data: Data) -> None:
        if self.hessian == "inputs":
            super().apply(model, scheme, data)
            return
        groups = groups_of(model, data, f"{self.name}: finding layers")
        layers, fishers = [layer for group in groups for layer in group.layers], []
        for chosen in passes(layers, matrices=1):
            fishers += fishers_of(model, chosen, data, f"{self.name}: gradients")
        for layer, fisher in zip(track(layers, self.name, data.progress), fishers, strict=True):
            self._round_layer(layer, fisher)

    def round_group(self, group: Group, sums: Moments) -> None:
        hessian = 2 / sums.tokens * sums.of_inputs
        for layer in group.layers:
            self._round_layer(layer, hessian)

    def _round_layer(self, layer: Layer, hessian: Tensor) -> None:
        rows, grid = layer.rows, layer.grid(layer.rows)
        layer.write(self.round(rows, grid, hessian), grid)

    def round(self, rows: Tensor, grid: Grid, hessian: Tensor) -> Tensor:
        """Return rows on their grid, float64 (outputs, inputs); hessian: (inputs, inputs)."""
        order = torch.arange(len(hessian), device=hessian.device)
        if self.act_order:
            order = hessian.diagonal().argsort(descending=True, stable=True)
        rounded = torch.empty_like(rows)
        rounded[:, order] = _round_columns(
            rows[:, order], grid.of(slice(None), order), hessian[order][:, order], self.damping
        )
        return rounded


def _round_columns(rows: Tensor, grid: Grid, hessian: Tensor, damping: float) -> Tensor:
    """Return rows on their grid; hessian changes in place."""
    hessian.diagonal()[hessian.diagonal() == 0] = 1  # no token has such an input
    factor = damped_factor(hessian, damping * hessian.diagonal().mean().item())
    upper = torch.linalg.cholesky(torch.cholesky_inverse(factor), upper=True)
    columns = rows.T.contiguous()  # each in one piece
    for start in range(0, len(hessian), BLOCK):
        inside, behind = slice(start, start + BLOCK), slice(start + BLOCK, None)
        part = grid.of(slice(None), inside)
        errors = _round_block(columns[inside], part, upper[inside, inside])
        columns[behind] -= upper[inside, behind].T @ errors
    return columns.T


def _round_block(columns: Tensor, grid: Grid, upper: Tensor) -> Tensor:
    """Round columns in place, and return what the columns behind the block have to make up for."""
    errors = torch.empty_like(columns)
    for i, values in enumerate(columns):
        rounded = grid.of(slice(None), slice(i, i + 1)).nearest(values[:, None])[:, 0]
        errors[i] = (values - rounded) / upper[i, i]
        columns[i:] -= upper[i, i:, None] * errors[i]
        columns[i] = rounded  # it is, but for float errors
    return errors
