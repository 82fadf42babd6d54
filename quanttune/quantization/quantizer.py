"""Modules that round one activation, or one weight, of a model."""

import torch
from torch import Tensor, nn

from ..fake_quantizer import fake_quant, scale_of
from .calibrators import Calibrator


class ActivationQuantizer(nn.Module):
    """Round an activation to the grid of one scale per tensor.

    While `calibrator` is set, tensors only pass by it; `freeze` turns what it saw into `scale`. A
    `dynamic` quantizer takes the range of each tensor from itself.
    """

    scale: Tensor

    def __init__(self, bits: int, calibrator: Calibrator | None, device: torch.device) -> None:
        super().__init__()
        self.bits = bits
        self.calibrator = calibrator
        self.dynamic = calibrator is None
        self.reached = False
        self.register_buffer("scale", torch.ones((), device=device))

    def forward(self, x: Tensor) -> Tensor:
        if self.calibrator is not None:
            if x.numel():
                self.calibrator.update(x.detach())
                self.reached = True
            return x
        if self.dynamic:
            return fake_quant(x, scale_of(x.detach().abs().amax(), self.bits), self.bits)
        if not self.reached:
            raise RuntimeError("this tensor was never reached during calibration: give more data")
        return fake_quant(x, self.scale, self.bits)

    def freeze(self, site: str) -> None:
        """Compute the scale from what the calibrator saw, and quantize from now on."""
        if self.reached and self.calibrator is not None:
            absmax = self.calibrator.absmax()
            if not absmax.isfinite():
                raise ValueError(f"{site} held NaN or inf during calibration: absmax {absmax}")
            self.scale = scale_of(absmax, self.bits).to(self.scale.device)
        self.calibrator = None

    def extra_repr(self) -> str:
        return f"bits={self.bits}, " + ("dynamic" if self.dynamic else f"scale={self.scale:.4g}")


class WeightQuantizer(nn.Module):
    """Round a weight to min-max grids: one per index of `axis`, or (None) one for the tensor.

    The scale follows the weight, so that a quantized model can be trained further.
    """

    def __init__(self, bits: int, axis: int | None) -> None:
        super().__init__()
        self.bits, self.axis = bits, axis

    def scale(self, weight: Tensor) -> Tensor:
        """Return the step, or the steps along `axis`, of a weight."""
        magnitude = weight.detach().abs()
        if self.axis is None:
            return scale_of(magnitude.amax(), self.bits)
        others = [dim for dim in range(weight.dim()) if dim != self.axis]
        return scale_of(magnitude.amax(others), self.bits)

    def forward(self, weight: Tensor) -> Tensor:
        return fake_quant(weight, self.scale(weight), self.bits, self.axis)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, axis={self.axis}"
