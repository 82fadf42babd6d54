"""Smoothing of the inputs that no norm gives, by a multiplication of its own."""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from ..running import Data
from .equalizing.pairs import Input
from .equalizing.readers import find_other_readers
from .smoothquant import SmoothQuant


@dataclass(frozen=True)
class SmoothInputs(SmoothQuant):
    """Divide channel c of other inputs by max|x_c|^alpha / max|W_c|^(1 - alpha), explicitly.

    These are the inputs that equalizations of norms leave alone: of Linear modules behind an
    activation function or attention. Nothing absorbs their factors, so that every
    runtime multiplies once more for each. Combine it with one of those equalizations.

    Args:
        alpha: from 0 (weights become even) to 1 (activations do). 0.9 was chosen on validation rows
            of MiniLM: what leaves a GELU has channels that differ more than those of a LayerNorm.

    Source: Xiao et al., SmoothQuant, arXiv 2211.10438, eq. 4. NNCF multiplies so as well.
    """

    name: ClassVar[str] = "smooth_inputs"
    alpha: float = 0.9

    def find(self, model: nn.Module, data: Data) -> list[Input]:
        return [Input(name, module) for name, module in find_other_readers(model, data).items()]
