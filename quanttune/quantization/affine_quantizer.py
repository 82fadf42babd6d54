"""The module that rounds one activation to a grid with a zero point."""

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..fake_quantizer import integer_range
from .calibrators import AffineCalibrator, Calibrator, Range
from .calibrators.search import affine_qparams
from .learning.lsq_plus import LearnedOffsetFakeQuant, zero_of
from .quantizer import ActivationQuantizer
from .rounded_linear import Rounding


class AffineQuantizer(ActivationQuantizer):
    """Round an activation to a grid with a zero point, which covers from `low` to `high`.

    Zero lies between them.
    """

    range_names = ("low", "high")
    symmetric = False
    low: Tensor
    high: Tensor
    shift: nn.Parameter | None  # of the value of code 0, while that is learned
    zero_point: Tensor  # `zero`, where a state_dict finds it: reading a tensor may wait for a GPU

    def __init__(
        self, bits: int, kind: str, calibrator: Calibrator | None, device: torch.device
    ) -> None:
        super().__init__(bits, kind, calibrator, device)
        zero_point = torch.zeros((), dtype=torch.int32, device=device)
        self.register_buffer("zero_point", zero_point)
        self.register_parameter("shift", None)

    def learn(self, how: str) -> list[nn.Parameter]:
        if how != "lsq+":
            return super().learn(how)
        self.shift = nn.Parameter(torch.zeros_like(self.scale))
        return [self._learn(self.step, how), self.shift]

    def stop_learning(self) -> None:
        if self.shift is not None:
            self._set_zero_point(self.code_of_zero())
            self.shift = None
        super().stop_learning()

    def code_of_zero(self) -> int:
        if self.shift is None:
            return self.zero
        return int(zero_of(self.step, self._offset.detach(), *integer_range(self.bits)))

    @property
    def keeps_input(self) -> bool:
        return self.shift is None

    @property
    def _offset(self) -> Tensor:
        """The value of code 0, which is moved in units of half of the range at the start."""
        half = self.scale * 2 ** (self.bits - 1)
        return half * self.shift - self.scale * self.zero

    def _rounding(self, x: Tensor, axis: int | None = None) -> Rounding:
        if self.shift is None or self.factor is None:
            return super()._rounding(x, axis)
        scale, ends = self.scale * self.factor, integer_range(self.bits)
        return LearnedOffsetFakeQuant, (scale, self._offset, *ends)

    def check_loaded(self, site: str) -> None:
        super().check_loaded(site)
        if self.shift is not None and not self.shift.isfinite():
            raise ValueError(f"{site}.shift must be finite")
        self.zero = int(self.zero_point)
        qmin, qmax = integer_range(self.bits)
        if not qmin <= self.zero <= qmax:
            raise ValueError(f"{site}.zero_point must be from {qmin} to {qmax}, got {self.zero}")

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.zero = int(self.zero_point)

    def set_scale(self, scale: Tensor) -> None:
        """Do so with the zero point from which the grid reaches down to `low`."""
        qmin, qmax = integer_range(self.bits)
        self._set_zero_point(int((qmin - torch.round(self.low / scale)).clamp(qmin, qmax)))
        super().set_scale(scale)

    def _observed(self, calibrator: Calibrator) -> Iterable[Tensor]:
        return cast(AffineCalibrator, calibrator).range().with_zero()

    def _set_grid(self) -> None:
        self.scale, zero_point = affine_qparams(Range(self.low, self.high), self.bits)
        self._set_zero_point(int(zero_point))

    def _set_zero_point(self, zero: int) -> None:
        self.zero_point, self.zero = torch.full_like(self.zero_point, zero), zero

    def _set_range(self) -> None:
        qmin, qmax = integer_range(self.bits)
        self.low = self.scale * (qmin - self.zero)
        self.high = self.scale * (qmax - self.zero)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, zero_point={self.code_of_zero()}"
