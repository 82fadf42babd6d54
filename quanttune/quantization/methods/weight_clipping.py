"""Clipping of weights: grids that cover less than the largest values, so that steps are smaller."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .rounding.layer_by_layer import LayerByLayer
from .rounding.layers import Grid
from .rounding.moments import Group, Moments

RATIOS = tuple(1 - i / 20 for i in range(10))  # of min-max; those of AWQ


@dataclass(frozen=True)
class WeightClipping(LayerByLayer):
    """Round Linear and Conv1D weights to nearest, on the grid of ten that changes outputs least.

    Grids cover 1, 0.95, ..., 0.55 of the largest value. What counts is the squared error of the
    outputs on `data`; each output channel, or group of its inputs, is judged alone. A layer is
    given what the layers before it, already rounded, make of the data. The authors leave queries
    and keys unclipped, which nothing but their names tells. Convolutions, embeddings and tied
    weights are rounded to nearest.

    Raises:
        ValueError: no layer is reached.

    Source: Lin et al., AWQ, arXiv 2306.00978, section 5 and its search of ranges.
    """

    name = "weight_clipping"

    def round_group(self, group: Group, sums: Moments) -> None:
        for layer in group.layers:
            rows = layer.rows
            grid = clipped(rows, layer.grid(rows), sums.of_inputs, layer.group_size)
            layer.write(grid.nearest(rows), grid)


def clipped(rows: Tensor, grid: Grid, gram: Tensor, size: int) -> Grid:
    """Return the part of a grid that rows lose least on.

    Args:
        rows: float64 (outputs, inputs).
        grid: of rows, of all, or of groups.
        gram: the sum over tokens of products of inputs, (inputs, inputs).
        size: inputs that share a scale; all where rows have one each.
    """
    groups = rows.shape[1] // size
    at = torch.arange(groups, device=rows.device)
    blocks = gram.unflatten(0, (groups, size)).unflatten(2, (groups, size))[at, :, at]
    best = rows.new_full((len(rows), groups), torch.inf)
    ratios = torch.ones_like(best)
    for ratio in RATIOS:
        trial = replace(grid, scale=grid.scale * ratio)
        errors = (trial.nearest(rows) - rows).unflatten(1, (groups, size))
        cost = (torch.einsum("rgi,gij->rgj", errors, blocks) * errors).sum(2)
        if grid.scale.dim() == 0:
            cost = cost.sum().expand_as(cost)
        ratios = torch.where(cost < best, ratio, ratios)
        best = torch.minimum(cost, best)
    chosen = {0: ratios[0, 0], 1: ratios[:, 0]}.get(grid.scale.dim())
    chosen = ratios.repeat_interleave(size, 1) if chosen is None else chosen
    return replace(grid, scale=(grid.scale * chosen).float())
