"""A grid of an activation that a method chose, in place of what calibration made."""

from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from .functional.iteration import children_of
from .quantizer import ActivationQuantizer


class OtherGrid(ActivationQuantizer):
    """Rounds an activation to a grid that a method chose; see `put`."""

    made_by: ClassVar[str]  # the method
    needs: ClassVar[str]  # what a processor does for it

    def __init__(self, bits: int, kind: str, device: torch.device, channels: int = 1) -> None:
        super().__init__(bits, kind, None, device)
        self.dynamic = False

    @classmethod
    def after(cls, quantizer: ActivationQuantizer, channels: int = 1) -> Self:
        """Make one for the tensor that a calibrated quantizer rounds."""
        made = cls(quantizer.bits, quantizer.kind, quantizer.scale.device, channels)
        made.observer, made.calibrated = quantizer.observer, quantizer.calibrated
        made.absmax, made.scale = quantizer.absmax.clone(), quantizer.scale.clone()
        return made

    @property
    def keeps_input(self) -> bool:
        return False  # what is faster in training is for uniform grids

    @property
    def largest_step(self) -> Tensor:
        """The distance between its largest two values."""
        return self.scale


def put(model: nn.Module, site: str, quantizer: nn.Module) -> None:
    """Let a quantizer round a site of a model in place of the one that did."""
    owner, _, name = site.rpartition(".")
    children_of(model.get_submodule(owner))[name] = quantizer
