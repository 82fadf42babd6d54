"""What a quantized model is: bits, granularity of weights, coverage, calibrator."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..fake_quantizer import integer_range
from . import coverage as coverages
from .calibrators import CALIBRATORS, Calibrator
from .quantizer import ActivationQuantizer, WeightQuantizer

DYNAMIC = "dynamic"  # no calibration: the range of each activation is taken from itself


@dataclass(frozen=True)
class Scheme:
    """Symmetric uniform quantization of weights and activations to `bits`; see `quantize`."""

    bits: int = 8
    calibrator: str | Callable[[], Calibrator] = "minmax"
    coverage: str = "full_no_softmax"
    weights: str = "channel"
    residual: bool = True

    def __post_init__(self) -> None:
        integer_range(self.bits)
        coverages.kinds_of(self.coverage, self.residual)
        names = (*CALIBRATORS, DYNAMIC)
        if isinstance(self.calibrator, str) and self.calibrator not in names:
            raise ValueError(
                f"calibrator must be one of {', '.join(names)}, or a function that makes one, "
                f"got {self.calibrator!r}"
            )
        if self.weights not in ("channel", "tensor"):
            raise ValueError(f'weights must be "channel" or "tensor", got {self.weights!r}')

    @property
    def kinds(self) -> frozenset[str]:
        """The kinds of activations that are quantized."""
        return coverages.kinds_of(self.coverage, self.residual)

    @property
    def dynamic(self) -> bool:
        return self.calibrator == DYNAMIC

    def activation_quantizer(self, device: torch.device) -> ActivationQuantizer:
        """Make the quantizer of one activation, ready to calibrate."""
        make = (
            CALIBRATORS.get(self.calibrator)
            if isinstance(self.calibrator, str)
            else self.calibrator
        )
        return ActivationQuantizer(self.bits, make() if make else None, device)

    def weight_quantizer(self, output_axis: int) -> WeightQuantizer:
        """Make the quantizer of one weight whose output channels lie along `output_axis`."""
        return WeightQuantizer(self.bits, output_axis if self.weights == "channel" else None)
