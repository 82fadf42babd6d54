"""AdaRound: learn which way each value of a weight is rounded."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .rounding.layer_by_layer import LayerByLayer
from .rounding.layers import Grid
from .rounding.moments import Group, Moments

LOW, HIGH = -0.1, 1.1  # a sigmoid is stretched to these, and cut to 0 and 1
WARM_UP = 0.2  # share of the iterations before values are driven to either side
SHARP, SOFT = 20.0, 2.0  # exponents that do so, at their begin and at the end
PULL = 3.0  # how hard they are driven; 0.45 of nearest's error became 0.39 as 1 became 3
LEARNING_RATE = 0.01


@dataclass(frozen=True)
class AdaRound(LayerByLayer):
    """Learn for each value of a Linear or Conv1D weight whether it is rounded up or down.

    What counts is the squared error of a layer's outputs on `data`, from their second moments: all
    tokens in each iteration, where the authors draw some and take 10,000 iterations; and in units
    of what rounding to nearest costs, so that layers of all sizes are driven alike. A row that ends
    worse than rounded to nearest is rounded to nearest. A layer is given what the layers before it,
    already rounded, make of the data. Grids are min-max. Convolutions, embeddings and tied weights
    are rounded to nearest.

    Args:
        iterations: of Adam, for each layer. An iteration multiplies the weight with a matrix of
            (inputs, inputs).

    Raises:
        ValueError: there is no iteration, or no layer is reached.

    Source: Nagel et al., Up or Down? Adaptive Rounding, arXiv 2004.10568.
    """

    name = "adaround"
    iterations: int = 1000

    def __post_init__(self) -> None:
        if type(self.iterations) is not int or self.iterations < 1:
            raise ValueError(f"iterations must be a whole number from 1, got {self.iterations!r}")

    def round_group(self, group: Group, sums: Moments) -> None:
        gram = sums.of_inputs / sums.tokens
        for layer in group.layers:
            rows, grid = layer.rows, layer.grid(layer.rows)
            layer.write(learned_rounding(rows, grid, gram, self.iterations), grid)


def learned_rounding(rows: Tensor, grid: Grid, moments: Tensor, iterations: int) -> Tensor:
    """Return rows on their grid, float64, each value at one of the two that it lies between.

    Args:
        rows: float64 (outputs, inputs).
        moments: of inputs, divided by the number of tokens, (inputs, inputs).
    """
    step, exact, products = grid.step.float(), rows.float(), moments.float()
    before = _cost(grid.nearest(rows) - rows, moments)
    unit = max(float(before.sum()) / rows.numel(), torch.finfo(torch.float32).tiny)
    floor = (exact / step).floor()
    rest = (exact / step - floor).clamp(0.01, 0.99)
    score = ((rest - LOW) / (HIGH - rest)).log().requires_grad_(True)
    optimizer = torch.optim.Adam([score], lr=LEARNING_RATE)
    with torch.enable_grad():
        for i in range(iterations):
            up = _stretched(score)
            errors = grid.clamp(floor + up) * step - exact
            loss = ((errors @ products) * errors).sum() / unit
            if i >= WARM_UP * iterations:
                done = (i / iterations - WARM_UP) / (1 - WARM_UP)
                sharpness = SHARP + (SOFT - SHARP) * done
                loss = loss + PULL * (1 - (2 * up - 1).abs() ** sharpness).sum()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    codes = grid.clamp(floor + (_stretched(score.detach()) >= 0.5)).double()
    learned = codes * grid.step
    is_better = _cost(learned - rows, moments) < before
    return torch.where(is_better[:, None], learned, grid.nearest(rows))


def _stretched(score: Tensor) -> Tensor:
    return (score.sigmoid() * (HIGH - LOW) + LOW).clamp(0, 1)


def _cost(errors: Tensor, moments: Tensor) -> Tensor:
    return ((errors @ moments) * errors).sum(1)
