"""PTQ4ViT: scales by what they do to the answer, and two ranges behind softmax and GELU."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from ..quantizer import ActivationQuantizer
from ..running import Data
from .searching.products import Attention, Linears, Searched
from .searching.scale_search import ScaleSearch
from .searching.sources import sources_of


@dataclass(frozen=True)
class BasePTQ(ScaleSearch):
    """Search scales by the cosine between exact and rounded products, once each.

    See ScaleSearch for its options and what it leaves alone. Grids stay uniform.

    Source: Yuan et al., PTQ4ViT, arXiv 2111.12293, its baseline.
    """

    name: ClassVar[str] = "base_ptq"
    metric: str = "cosine"
    rounds: int = 1


@dataclass(frozen=True)
class PTQ4ViT(ScaleSearch):
    """Search scales by errors that are weighted with the answer's gradient; use twin ranges.

    What softmax returns may have a range of fine steps below 2^-m and one of coarse steps, what a
    GELU returns one below zero and one above; each where that is better than one range. Such grids
    are not uniform: they are simulated, saved and loaded, and refused at export; twin=False leaves
    them out. See ScaleSearch for the other options. The gradient is that of the answer with random
    signs, and needs no labels: that of the official code, of a divergence of the float model from
    itself, is zero. Splits are searched with rounded values, and no part is added twice.

    Raises:
        ValueError: as ScaleSearch, or what softmax or a GELU returns has a zero point.

    Source: Yuan et al., PTQ4ViT, arXiv 2111.12293.
    """

    name: ClassVar[str] = "ptq4vit"
    metric: str = "hessian"
    low: float = 0.01
    twin: bool = True

    def twins_of(self, model: nn.Module, data: Data) -> Callable[[Searched], bool]:
        behind = sources_of(model, data, _is_gelu) if self.twin else {}

        def is_twin(searched: Searched) -> bool:
            if isinstance(searched, Linears):
                return searched.leader in behind
            return self.twin and _is_probability(searched)

        return is_twin


def _is_probability(attention: Attention) -> bool:
    quantizer = attention.quantizer(0)
    return isinstance(quantizer, ActivationQuantizer) and quantizer.kind == "probability"


def _is_gelu(module: nn.Module) -> bool:
    return "gelu" in type(module).__name__.lower()
