"""PreQuant: quantize first, and let training move nothing but weights that are outliers."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..outliers import Outliers, check_share, largest_of
from .rounding.layer_by_layer import LayerByLayer
from .rounding.moments import Group, Means


@dataclass(frozen=True)
class PreQuant(LayerByLayer):
    """Round Linear and Conv1D weights to nearest, and mark the largest, for training alone.

    They are a share of the weights of each layer. The model is the one of plain rounding, until
    `learn_outliers` lets a trainer move them, in float, while codes and places stay. Convolutions,
    embeddings and tied weights are rounded to nearest, all of them.

    What was marked are floats among codes: no export writes them.

    Args:
        share: of each layer's weights, that is marked.

    Raises:
        ValueError: the share is out of range, or no layer is reached.

    Source: Gong et al., PreQuant, arXiv 2306.00014.
    """

    name: ClassVar[str] = "prequant"
    sums = Means
    share: float = 0.01

    def __post_init__(self) -> None:
        check_share(self.share)

    @torch.no_grad()
    def round_group(self, group: Group, sums: Means) -> None:
        for layer in group.layers:
            weight = layer.module.weight
            positions = largest_of(weight.abs(), self.share)
            layer.write(layer.rows, layer.grid(layer.rows))
            layer.quantizer.outliers = Outliers(positions, weight.view(-1)[positions].clone())
