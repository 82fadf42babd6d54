"""How much of a site's error is saturation, and how much is lost precision (Fig. 3 of the paper).

With [low, high] what the grid represents and c = clip(x, low, high), the error x - Q(x) is
(x - c) + (c - Q(x)). A value that saturates lands on the grid, so one of the two is always zero:
sums of squares and of magnitudes add exactly.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Quantize = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ErrorSplit:
    """Sums over the elements: of squared errors, and of their magnitudes."""

    elements: int = 0
    saturation: float = 0.0
    precision: float = 0.0
    saturation_magnitude: float = 0.0
    precision_magnitude: float = 0.0

    def __add__(self, other: "ErrorSplit") -> "ErrorSplit":
        sums = zip(vars(self).values(), vars(other).values(), strict=True)
        return ErrorSplit(*(a + b for a, b in sums))

    @property
    def total(self) -> float:
        return self.saturation + self.precision

    @property
    def precision_share(self) -> float:
        """Precision loss as a share of the squared error; 1 where there is no error."""
        return self.precision / self.total if self.total else 1.0


def split_error(x: Tensor, quantize: Quantize) -> ErrorSplit:
    """Split the error of `quantize(x)`; it may be any uniform grid that saturates.

    Source: QuantTune, arXiv 2403.06497, section 3; squares and magnitudes are our choice.
    """
    x = x.float()
    low, high = quantize(x.new_tensor([-torch.inf, torch.inf])).tolist()
    clipped = x.clamp(low, high)
    saturation = _sums(x - clipped)
    precision = _sums(clipped.sub_(quantize(x)))
    return ErrorSplit(x.numel(), saturation[0], precision[0], saturation[1], precision[1])


def _sums(error: Tensor) -> tuple[float, float]:
    """Return the sums of squares and of magnitudes, in the memory of the errors.

    torch adds float32 in pairs: the rounding stays near 1e-7 of the sum.
    """
    mass = error.abs_().sum().item()
    return error.square_().sum().item(), mass
