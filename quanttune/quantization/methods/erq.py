"""ERQ: ridge regression against the error of activations, then against that of weights."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ..running import Data, in_float
from ..scheme import Scheme
from .method import Rounding
from .rounding.flips import FLIPS, choose_codes
from .rounding.layers import Grid, Layer
from .rounding.linear_systems import ridge
from .rounding.moments import Moments, groups_of, passes, sums_of

ROWS = 512  # of a weight that are rounded together


@dataclass(frozen=True)
class ERQ(Rounding):
    """Change Linear and Conv1D weights, and biases, to make up for rounded inputs; then round them.

    First (Aqer) the float weight becomes the one whose outputs from rounded inputs are nearest to
    those from float inputs. Then (Wqer) half of the columns that are left is rounded at a time,
    its codes chosen together, and the columns that follow make up for their error. Layers are
    treated apart, each with the inputs of the float model. Grids are min-max of the weights after
    the first step. Convolutions, embeddings and tied weights are rounded to nearest.

    Args:
        damping: of both regressions, per token. The official code has 1000 for 32 images of 197
            tokens, which is .16.
        flip: which code of a row is changed next: "published", the one the gradient of the row's
            error is largest for, or "greedy", the one that lowers the error most.

    Raises:
        ValueError: an option is unknown, or no layer is reached.

    Source: Zhong et al., ERQ: Error Reduction for Post-Training Quantization of Vision
    Transformers, arXiv 2407.06794.
    """

    name = "erq"
    damping: float = 0.16
    flip: str = "published"

    def __post_init__(self) -> None:
        if self.flip not in FLIPS:
            raise ValueError(f"flip must be one of {', '.join(FLIPS)}, got {self.flip!r}")

    def apply(self, model: nn.Module, scheme: Scheme, data: Data) -> None:
        found: list[tuple[Layer, Tensor, Grid, Tensor]] = []
        with in_float(model):
            groups = groups_of(model, data, f"{self.name}: finding layers")
            layers = sum(len(group.layers) for group in groups)
            for chosen in passes(groups, matrices=2):
                what = f"{self.name}: inputs of layers"
                sums = sums_of(model, chosen, data, partial(Moments, cross=True), what)
                for group, moments in zip(chosen, sums, strict=True):
                    for layer in group.layers:
                        data.progress(self.name, len(found), layers)
                        found.append((layer, *self._solve(layer, moments)))
        data.progress(self.name, layers, layers)
        # all at the end: the passes above are of the float model
        for layer, rows, grid, bias in found:
            layer.write(rows, grid)
            if layer.module.bias is not None:
                layer.module.bias.data.copy_(bias)

    def _solve(self, layer: Layer, moments: Moments) -> tuple[Tensor, Grid, Tensor]:
        """Return a layer's new rows, the grid they are on, and its new bias."""
        rows, bias = layer.rows, layer.module.bias
        if bias is not None:
            rows = torch.cat([rows, bias.detach().double()[:, None]], 1)
        used = slice(rows.shape[1])  # all, or without the channel of ones
        gram, cross = moments.gram[used, used], moments.cross[used, used]
        damping = self.damping * moments.tokens
        rows = compensate(rows, gram, cross, damping)
        columns = slice(layer.inputs)
        grid = layer.grid(rows[:, columns])
        rows = round_columns(rows, grid, gram, moments.tokens, layer.inputs, damping, self.flip)
        return rows[:, columns].float(), grid, rows[:, -1].float()


def compensate(rows: Tensor, gram: Tensor, cross: Tensor, damping: float) -> Tensor:
    """Return the rows whose products with rounded inputs are near the old ones' with float inputs.

    It is the ridge regression of the difference, which costs its square times `damping`.
    """
    return rows + ridge(gram, (cross - gram) @ rows.T, damping).T


def round_columns(
    rows: Tensor, grid: Grid, gram: Tensor, tokens: float, columns: int, damping: float, flip: str
) -> Tensor:
    """Put the first `columns` on their grid, half of what is left at a time, in their order.

    Those that follow, a bias among them, change so that products change little.
    """
    rows = rows.clone()
    begin, width = 0, rows.shape[1]
    while begin < columns:
        end = begin + max(1, (width - begin) // 2)
        now, later = slice(begin, end), slice(end, None)
        passed_on = ridge(gram[later, later], gram[later, now], damping).T
        for first in range(0, len(rows), ROWS):
            part = slice(first, first + ROWS)
            chosen = grid.of(part, now)
            rounded = choose_codes(rows[part, now], chosen, gram[now, now] / tokens, flip)
            rows[part, later] -= (rounded - rows[part, now]) @ passed_on
            rows[part, now] = rounded
        begin = end
    return rows
