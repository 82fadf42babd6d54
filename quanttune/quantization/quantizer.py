"""Modules that round one activation, or one weight, of a model."""

import torch
from torch import Tensor, nn

from ..fake_quantizer import dynamic_fake_quant, fake_quant, scale_of
from .calibrators import Calibrator


class ActivationQuantizer(nn.Module):
    """Round an activation to the grid of one scale per tensor.

    While `calibrator` is set, tensors only pass by it; `freeze` turns what it saw into `scale`. A
    `dynamic` quantizer takes the range of each tensor from itself.
    """

    absmax: Tensor  # what the grid covers
    scale: Tensor

    def __init__(self, bits: int, calibrator: Calibrator | None, device: torch.device) -> None:
        super().__init__()
        self.bits = bits
        self.calibrator = calibrator
        self.dynamic = calibrator is None
        self.reached = False
        self.register_buffer("absmax", torch.zeros((), device=device), persistent=False)
        self.register_buffer("scale", torch.ones((), device=device))

    def forward(self, x: Tensor) -> Tensor:
        if self.calibrator is not None:
            if x.numel():
                self.calibrator.update(x.detach())
                self.reached = True
            return x
        if self.dynamic:
            return dynamic_fake_quant(x, self.bits)
        if not self.reached:
            raise RuntimeError("this tensor was never reached during calibration: give more data")
        return fake_quant(x, self.scale, self.bits)

    def freeze(self, site: str) -> None:
        """Compute the scale from what the calibrator saw, and quantize from now on."""
        if self.reached and self.calibrator is not None:
            seen = self.calibrator.absmax()
            if not seen.isfinite():
                raise ValueError(f"{site} held NaN or inf during calibration: absmax {seen}")
            self.absmax = seen.to(self.scale.device)
            self.set_bits(self.bits)
        self.calibrator = None

    def set_bits(self, bits: int) -> None:
        """Cover the same range with integers of another width."""
        self.bits, self.scale = bits, scale_of(self.absmax, bits)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, " + ("dynamic" if self.dynamic else f"scale={self.scale:.4g}")


class WeightQuantizer(nn.Module):
    """Round a weight to min-max grids: one per index of `axis`, or (None) one for the tensor.

    The scale follows the weight, so that a quantized model can be trained further. It is not
    `enabled` while activations are calibrated: their ranges are those of the float model.
    """

    def __init__(self, bits: int, axis: int | None) -> None:
        super().__init__()
        self.bits, self.axis = bits, axis
        self.enabled = True

    def forward(self, weight: Tensor) -> Tensor:
        return dynamic_fake_quant(weight, self.bits, self.axis) if self.enabled else weight

    def extra_repr(self) -> str:
        return f"bits={self.bits}, axis={self.axis}"
