"""Which way each value of a row is rounded, so that their errors cancel."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from .layers import Grid

STEPS = 100  # flips per row, as published

# from errors of values, what the other codes would add, errors @ moments, diagonal of the moments:
# of each row the value to flip, and whether to
Choose = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def choose_codes(rows: Tensor, grid: Grid, moments: Tensor, flip: str) -> Tensor:
    """Round rows to a neighbouring code each, so that the squared error of their products falls.

    It begins with the nearest codes and takes the other one of one value per row and step, as long
    as that lowers d^T moments d, of the errors d of a row.

    Args:
        rows: float64 (rows, columns).
        moments: of the columns' inputs, divided by the number of tokens (columns, columns).
        flip: of FLIPS.
    """
    choose, diagonal = FLIPS[flip], moments.diagonal()
    nearest, steps = grid.codes(rows), rows / grid.step
    other = grid.clamp(steps.floor()) + grid.clamp(steps.ceil()) - nearest
    values, change = nearest * grid.step, (other - nearest) * grid.step
    slope = (values - rows) @ moments
    for _ in range(STEPS):
        index, wanted = choose(values - rows, change, slope, diagonal)
        added = change.gather(1, index)
        cost = added * (2 * slope.gather(1, index) + added * diagonal[index])
        added = torch.where(wanted & (cost < 0), added, 0)
        if not added.any():
            break
        values.scatter_add_(1, index, added)
        change.scatter_add_(1, index, -2 * added)
        slope += added * moments[index[:, 0]]
    return grid.nearest(values)  # without what adding up left


def _published(
    errors: Tensor, change: Tensor, slope: Tensor, diagonal: Tensor
) -> tuple[Tensor, Tensor]:
    """Take a step down the gradient where that is steepest, among errors that it makes smaller."""
    gradient = 2 * slope
    steepness, index = torch.where(errors * gradient > 0, gradient.abs(), 0).max(1, keepdim=True)
    # the other code is nearer to where the step ends
    nearer = (gradient + change).gather(1, index).abs() < steepness
    return index, nearer


def _greedy(
    errors: Tensor, change: Tensor, slope: Tensor, diagonal: Tensor
) -> tuple[Tensor, Tensor]:
    """Take the flip that lowers the error most."""
    cost = (change * (2 * slope + change * diagonal)).min(1, keepdim=True)
    return cost.indices, cost.values < 0


FLIPS: Mapping[str, Choose] = MappingProxyType({"published": _published, "greedy": _greedy})
