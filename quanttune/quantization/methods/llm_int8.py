"""LLM.int8(): columns of inputs that hold outliers in float, beside rows of integers."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from ..channel_grids import OutlierColumnQuantizer
from ..modules import inputs_of
from ..other_grid import put
from ..quantizer import ActivationQuantizer
from ..running import Data
from ..scheme import Scheme
from .method import Regridding


@dataclass(frozen=True)
class LLMInt8(Regridding):
    """Multiply channels in float that hold an outlier, and the others with a scale for each token.

    A channel of the input of a Linear or Conv1D counts as one if any token of the call reaches the
    threshold there, so that answers depend on what else is in the batch, padding too. It meets the
    float weight, which is kept beside the codes; so no method may round the weights. Scales of
    tokens are taken from themselves: with `calibrator="dynamic"` it takes no data. These are no
    plain integers, and no export writes them.

    Args:
        threshold: the magnitude from which on a value is an outlier, in units of the activation.

    Raises:
        ValueError: the threshold is not positive, no input of a Linear is rounded, or activations
            have zero points.

    Source: Dettmers et al., LLM.int8(), arXiv 2208.07339. Its library, bitsandbytes, keeps no float
    weight: there outliers meet the codes.
    """

    name: ClassVar[str] = "llm_int8"
    reads_data: ClassVar[bool] = False
    keeps_weights: ClassVar[bool] = True
    threshold: float = 6.0

    def __post_init__(self) -> None:
        if not 0 < self.threshold < float("inf"):
            raise ValueError(f"threshold must be positive, got {self.threshold!r}")

    def apply(self, model: nn.Module, scheme: Scheme, data: Data) -> None:
        if not scheme.symmetric:
            raise ValueError("llm_int8 has symmetric rows: leave symmetric=True")
        sites = {
            f"{name}.input_quantizer".lstrip("."): module.input_quantizer
            for name, module in model.named_modules()
            if inputs_of(module) is not None
        }
        rounded = {s: one for s, one in sites.items() if isinstance(one, ActivationQuantizer)}
        if not rounded:
            raise ValueError(
                "llm_int8 is for inputs of Linear modules, none of which is rounded: take a "
                "coverage such as linear_inputs"
            )
        for site, one in rounded.items():
            made = OutlierColumnQuantizer.after(one)
            made.dynamic = one.dynamic
            made.threshold = torch.full_like(made.threshold, self.threshold)
            put(model, site, made)
