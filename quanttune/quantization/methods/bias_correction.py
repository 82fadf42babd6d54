"""Bias correction: rounding to nearest, and biases that make up for its mean error."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ...masks import Mask
from ..passes import in_float
from ..scheme import Scheme
from .layers import Layer
from .method import Rounding
from .moments import Group, Moments, groups_of, moments_of, passes
from .turns import in_turn


@dataclass(frozen=True)
class BiasCorrection(Rounding):
    """Round Linear and Conv1D weights to nearest, and add the mean error of outputs to biases.

    The mean is that over the tokens of `data`, of each output, against the float model. Layers are
    taken one after the other: what reaches one has gone through those that are corrected already.
    Layers without a bias are rounded only; so are convolutions, embeddings and tied weights.

    Raises:
        ValueError: no layer is reached.

    Source: Nagel et al., Data-Free Quantization, arXiv 1906.04721, its empirical form; AWEQ
    (arXiv 2311.01305) ends with such a correction.
    """

    name = "bias_correction"

    def apply(
        self, model: nn.Module, scheme: Scheme, data: Iterable[Any], mask: Mask | None
    ) -> None:
        groups = groups_of(model, data, mask)
        wanted: dict[Layer, Tensor] = {}  # mean outputs of the float model
        with in_float(model):
            for chosen in passes(groups, matrices=2):
                sums = moments_of(model, chosen, data, mask, cross=True)
                for group, moments in zip(chosen, sums, strict=True):
                    mean = moments.cross[-1, :-1] / moments.tokens
                    wanted |= {layer: layer.rows @ mean for layer in group.layers}

        def correct(group: Group, moments: Moments) -> None:
            mean = moments.gram[-1, :-1] / moments.tokens
            for layer in group.layers:
                layer.settle(layer.rows, layer.grid(layer.rows))
                if layer.module.bias is not None:
                    layer.module.bias.data += wanted[layer] - layer.rows @ mean

        in_turn(model, groups, data, mask, correct)
