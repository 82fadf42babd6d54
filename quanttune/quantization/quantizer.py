"""Modules that round one activation, or one weight, of a model."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..fake_quantizer import (
    DynamicFakeQuant,
    dynamic_fake_quant,
    fake_quant,
    integer_range,
    scale_of,
)
from ..reference import absmax
from .calibrators import Calibrator
from .grid import LEARNED, Grid, check_scale
from .learning.dorefa import squashed, top_of
from .rounded_linear import Rounding, rounded_linear
from .token_mask import without_padding


class ActivationQuantizer(Grid):
    """Round an activation to the symmetric grid of one scale per tensor.

    While `calibrator` is set, tensors only pass by it; `freeze` turns what it saw into `scale`. A
    `dynamic` quantizer takes the range of each tensor from itself.
    """

    range_names: tuple[str, ...] = ("absmax",)  # buffers: the ends of the range; NaN while unknown
    grid = "uniform"  # value_grids.py and channel_grids.py have others
    absmax: Tensor

    def __init__(
        self, bits: int, kind: str, calibrator: Calibrator | None, device: torch.device
    ) -> None:
        super().__init__()
        self.bits, self.kind = bits, kind
        self.calibrator = calibrator
        self.observer: str | None = None  # the calibrator's name
        self.dynamic = calibrator is None
        self.calibrated = False
        # float32 whatever the default type is
        options = {"dtype": torch.float32, "device": device}
        for name in self.range_names:
            self.register_buffer(name, torch.full((), torch.nan, **options))  # type: ignore[call-overload]
        self.register_buffer("scale", torch.ones((), **options))  # type: ignore[call-overload]
        self.register_parameter("factor", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.calibrator is not None:
            # what a calibrator computes is no part of the model: no mode has to follow it
            with torch._C.DisableTorchFunction():
                if x.numel():
                    self.calibrator.update(without_padding(x, self.kind).detach())
                    self.calibrated = True
            return x
        return self.round(x) if self.enabled else x

    def round(self, x: Tensor) -> Tensor:
        """Round x to the grid.

        Raises:
            RuntimeError: no calibration came by here.
        """
        return self._round(x)

    def linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, exact: Tensor | None = None
    ) -> Tensor:
        """Return F.linear of what x becomes here.

        exact: the weight before it was rounded, for grids that leave some of x in float.
        """
        is_watched = self._forward_hooks or self._forward_pre_hooks or type(x) is not Tensor
        if (
            self._passes
            or not self.keeps_input
            or is_watched
            or not torch.is_grad_enabled()
            or torch.compiler.is_compiling()
        ):
            return F.linear(self(x), weight, bias)
        return rounded_linear(x, weight, bias, self._rounding(x))

    @property
    def keeps_input(self) -> bool:
        """Whether a product in training keeps its input as it came, to round it once more."""
        return True

    @property
    def _passes(self) -> bool:
        """Whether a tensor leaves as it came."""
        return not self.enabled or self.calibrator is not None

    def _rounding(self, x: Tensor, axis: int | None = None) -> Rounding:
        if self.dynamic:
            return DynamicFakeQuant, (self.bits, axis, self.range_gradient)
        if not self.calibrated:
            raise RuntimeError("this tensor was never reached during calibration: give more data")
        return super()._rounding(x, axis)

    def freeze(self, site: str) -> None:
        """Compute the scale from what the calibrator saw, and quantize from now on."""
        if self.calibrated and self.calibrator is not None:
            for name, seen in zip(self.range_names, self._observed(self.calibrator), strict=True):
                if not seen.isfinite():
                    raise ValueError(f"{site} held NaN or inf during calibration: {name} {seen}")
                setattr(self, name, seen.to(self.scale))
            self.set_bits(self.bits)
        self.calibrator = None

    def check_loaded(self, site: str) -> None:
        """Check what was loaded, and quantize with it if it was calibrated.

        Raises:
            ValueError: the scale is not finite and positive, or the range is none.
        """
        check_scale(site, self.scale)
        check_scale(site, self.step)
        for name in self.range_names:
            end = getattr(self, name)
            if end.isinf() or (name == "absmax" and end < 0):
                raise ValueError(f"{site}.{name} is no end of a range: {end}")
        known = all(getattr(self, name).isfinite() for name in self.range_names)
        self.calibrated = known and not self.dynamic

    def set_bits(self, bits: int) -> None:
        """Cover the same range with integers of another width."""
        if self.learned_by is not None:
            raise ValueError("the scales are being learned: call freeze_scales(model) first")
        self.bits = bits
        if self.calibrated:
            self._set_grid()

    def set_scale(self, scale: Tensor) -> None:
        """Round in steps of this scale, a constant, and cover what its grid does."""
        self.scale = scale
        self._set_range()

    def learn(self, how: str) -> list[nn.Parameter]:
        """Begin to learn the range, and return the parameters that do.

        Raises:
            ValueError: such a grid has nothing to learn in this way.
        """
        if how not in LEARNED:
            raise ValueError(
                f"{how} learns an offset, which symmetric grids have none of: quantize with "
                "symmetric=False"
            )
        return [self._learn(self.step, how)]

    def stop_learning(self) -> None:
        if self.learned_by is not None:
            super().stop_learning()
            self._set_range()

    def code_of_zero(self) -> int:
        """Return the code of 0 at present; on a GPU one that is learned is waited for."""
        return self.zero

    def _observed(self, calibrator: Calibrator) -> Iterable[Tensor]:
        """Return the ends of the range that is to be covered."""
        return (calibrator.absmax(),)

    def _set_grid(self) -> None:
        """Compute the grid that covers the range."""
        self.scale = scale_of(self.absmax, self.bits)

    def _set_range(self) -> None:
        """Take the range that the grid covers."""
        self.absmax = self.scale * integer_range(self.bits)[1]

    def extra_repr(self) -> str:
        return f"bits={self.bits}, " + ("dynamic" if self.dynamic else f"scale={self.step:.4g}")


class WeightQuantizer(Grid):
    """Round a weight to grids: one per index of `axis`, or (None) one for the tensor.

    Without a `scale` the grids are min-max, and follow the weight when it is trained. With a `top`
    it is squashed before that.
    """

    top: Tensor | None

    def __init__(self, bits: int, axis: int | None) -> None:
        super().__init__()
        self.bits, self.axis = bits, axis
        self._held: tuple[Any, ...] | None = None  # a version of a parameter, and what came of it
        self.outliers: Any = None  # what stays in float: outliers.py
        self.register_buffer("scale", None)
        self.register_parameter("factor", None)
        self.register_buffer("top", None)

    @property
    def granularity(self) -> str:
        """What has a scale of its own."""
        return "tensor" if self.axis is None else "channel"

    def forward(self, weight: Tensor) -> Tensor:
        rounded = self.round(weight) if self.enabled else weight
        return rounded if self.outliers is None else self.outliers.put_into(rounded)

    def round(self, weight: Tensor) -> Tensor:
        """Round a weight to its grids, all of it."""
        return self._round(self.squashed(weight), self.axis)

    def squashed(self, weight: Tensor) -> Tensor:
        """Return a weight as it is rounded: itself, or the tanh of DoReFa."""
        return weight if self.top is None else squashed(weight, self.top)

    def hold(self) -> None:
        """From now on round a parameter once, as long as it is not changed, until the next call.

        A change by way of `.data` is one that nobody is told of: call it again then.
        """
        self._held = ()

    def _rounding(self, x: Tensor, axis: int | None = None) -> Rounding:
        if self.scale is not None:
            return super()._rounding(x, axis)
        arguments = self.bits, axis, self.range_gradient
        if self._held is None or not isinstance(x, nn.Parameter):
            return DynamicFakeQuant, arguments
        version = x.data_ptr(), x._version, arguments
        if self._held[:1] != (version,):
            self._held = version, dynamic_fake_quant(x.detach(), self.bits, axis)
        return DynamicFakeQuant, (*arguments, self._held[1])

    def round_rows(self, rows: Tensor, weight: Tensor, indices: Tensor) -> Tensor:
        """Round rows that were taken from a weight, without rounding all of it."""
        if not self.enabled:
            return rows
        if self.axis is None:
            return fake_quant(rows, self.scale_of(weight), self.bits)
        if self.scale is None:  # rows have scales of their own
            return dynamic_fake_quant(rows, self.bits, self.axis, self.range_gradient)
        return fake_quant(rows, self.step[indices], self.bits, self.axis)

    def scale_of(self, weight: Tensor) -> Tensor:
        """Return the scales of a weight, of shape () or (channels,)."""
        if self.scale is not None:
            return self.step
        weight = self.squashed(weight.detach())
        return scale_of(absmax(weight, self.axis).float(), self.bits)

    def scales_in(self, weight: Tensor) -> torch.Size:
        """Return the shape of the scales of a weight."""
        return torch.Size(() if self.axis is None else weight.shape[self.axis : self.axis + 1])

    def learn(self, scale: Tensor) -> nn.Parameter:
        """Begin to learn the scales from those given; they no longer follow the weight."""
        return self._learn(scale, "lsq")

    def squash(self, weight: Tensor) -> None:
        """Begin to squash a weight before it is rounded."""
        self.top, self.learned_by = top_of(weight), "dorefa"

    def stop_learning(self) -> None:
        """Make learned scales constants; a weight that was squashed has to become what it was."""
        if self.top is None:
            super().stop_learning()
        self.top, self.learned_by = None, None

    def extra_repr(self) -> str:
        return f"bits={self.bits}, axis={self.axis}"


def is_quantizer(name: str, module: nn.Module | None) -> bool:
    """Tell whether `quantize` gave a module to its parent; Identity leaves a site in float."""
    ours = (ActivationQuantizer, WeightQuantizer, nn.Identity)
    return name.endswith("_quantizer") and isinstance(module, ours)
