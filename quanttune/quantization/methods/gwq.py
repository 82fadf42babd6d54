"""GWQ: the weights that the answer depends on most stay in 16 bits."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ...progress import track
from ..outliers import Outliers, check_share, largest_of
from ..running import Data
from ..scheme import Scheme
from .method import Rounding
from .rounding.fisher import squared_gradients_of
from .rounding.layers import Layer
from .rounding.moments import groups_of


@dataclass(frozen=True)
class GWQ(Rounding):
    """Keep weights of the largest gradients in 16 bits, and round the others to nearest.

    They are a share of the weights of each Linear and Conv1D; grids cover the others alone. As
    published it is for `coverage="weight_only"`, weights of 3 or 4 bits in groups. The gradient is
    that of the model's answer in float, each element with a random sign, squared and summed over
    `data`; the authors take that of a language model's loss on one sample. Convolutions, embeddings
    and tied weights are rounded to nearest, all of them.

    Kept weights are floats among codes: no export writes them.

    Args:
        share: of each layer's weights, that is kept.

    Raises:
        ValueError: the share is out of range, no layer is reached, or the answer has no gradient.

    Source: Shao et al., GWQ, arXiv 2411.00850.
    """

    name: ClassVar[str] = "gwq"
    share: float = 0.01

    def __post_init__(self) -> None:
        check_share(self.share)

    def apply(self, model: nn.Module, scheme: Scheme, data: Data) -> None:
        groups = groups_of(model, data, f"{self.name}: finding layers")
        layers = [layer for group in groups for layer in group.layers]
        found = squared_gradients_of(model, layers, data, f"{self.name}: gradients")
        for layer, gradients in zip(track(layers, self.name, data.progress), found, strict=True):
            keep_outliers(layer, largest_of(gradients, self.share))


@torch.no_grad()
def keep_outliers(layer: Layer, positions: Tensor) -> None:
    """Keep weights at these positions in 16 bits, and round the others to a grid of their own."""
    flat = layer.module.weight.view(-1)
    kept = flat[positions]
    half = kept.half().to(kept.dtype)
    kept = torch.where(half.isfinite(), half, kept)
    flat[positions] = 0
    layer.write(layer.rows, layer.grid(layer.rows))
    flat[positions] = kept
    layer.quantizer.outliers = Outliers(positions, kept)
