"""Grids of activations that are more than one scale and integers: twin ranges, powers of two,
factors and groups of channels, a noise beneath, columns in float. They take the place of what
calibration made.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import reference
from ..fake_quantizer import dynamic_fake_quant, fake_quant, integer_range
from .functional.iteration import children_of
from .quantizer import ActivationQuantizer, check_scale

SHIFTS = 3  # the largest exponent of a channel's factor


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


class TwinQuantizer(OtherGrid):
    """Round what is below `split` in steps of `fine`, what is not in steps of `scale`.

    A code is one bit, which tells the range, and the magnitude: with Q = 2^(bits - 1), up to Q - 1
    steps, or Q below zero. Of a softmax the split is 2^-m and scale = 1 / Q = 2^m fine; behind a
    GELU the split is 0.

    Source: Yuan et al., PTQ4ViT, arXiv 2111.12293, section 3.2.
    """

    grid = "twin"
    made_by = "ptq4vit"
    needs = "codes of two ranges, which differ by a shift behind a softmax"
    fine: Tensor
    split: Tensor

    def __init__(self, bits: int, kind: str, device: torch.device, channels: int = 1) -> None:
        super().__init__(bits, kind, device)
        for name in ("fine", "split"):
            self.register_buffer(name, torch.ones((), dtype=torch.float32, device=device))

    def of(self, scale: Tensor | float, fine: Tensor | float, split: float) -> Self:
        """Take these ranges, and return itself."""
        for name, value in (("scale", scale), ("fine", fine), ("split", split)):
            setattr(self, name, torch.as_tensor(value, dtype=torch.float32).to(self.absmax.device))
        self._set_range()
        return self

    def round(self, x: Tensor) -> Tensor:
        below, above = (fake_quant(x, step, self.bits) for step in (self.fine, self.scale))
        return torch.where(x < self.split.to(x.dtype), below, above)

    def check_loaded(self, site: str) -> None:
        super().check_loaded(site)
        check_scale(f"{site}.fine", self.fine)
        if not 0 <= self.split <= 1:
            raise ValueError(f"{site}.split must be from 0 to 1, got {self.split}")


class LogQuantizer(OtherGrid):
    """Round a probability p to 2^-code, code = round(-log2 p); from code 2^bits on, to 0.

    It needs no scale. The probabilities of a query no longer add up to 1.

    Source: Lin et al., FQ-ViT, arXiv 2111.13824, section 3.3, without its integer exponential.
    """

    grid = "log2"
    made_by = "fq_vit"
    needs = "shifts in place of products"

    @classmethod
    def after(cls, quantizer: ActivationQuantizer, channels: int = 1) -> Self:
        made = super().after(quantizer)
        made.absmax, made.scale = (torch.ones_like(made.scale) for _ in range(2))
        return made

    @property
    def largest_step(self) -> Tensor:
        return self.scale / 2

    def round(self, x: Tensor) -> Tensor:
        code = (-x.detach().float().log2()).round().clamp_min(0)
        value = torch.where(code < 2**self.bits, torch.exp2(-code), 0).to(x.dtype)
        return (x - x.detach()) + value  # the gradient goes straight through


class ChannelShiftQuantizer(OtherGrid):
    """Round each channel, along the last dimension, in steps of 2^exponent * scale.

    The codes of all channels, shifted left by their exponents, are integers of one scale.

    Source: Lin et al., FQ-ViT, arXiv 2111.13824, section 3.2 (power-of-two factor).
    """

    grid = "channel_shift"
    made_by = "fq_vit"
    needs = "a shift for each channel"
    exponents: Tensor  # int32 (channels,), from 0 to SHIFTS

    def __init__(self, bits: int, kind: str, device: torch.device, channels: int = 1) -> None:
        super().__init__(bits, kind, device)
        exponents = torch.full((channels,), SHIFTS, dtype=torch.int32, device=device)
        self.register_buffer("exponents", exponents)

    def round(self, x: Tensor) -> Tensor:
        return fake_quant(x, self.scale * torch.exp2(self.exponents), self.bits, x.dim() - 1)

    def check_loaded(self, site: str) -> None:
        super().check_loaded(site)
        low, high = self.exponents.aminmax()
        if low < 0 or high > SHIFTS:
            raise ValueError(f"{site}.exponents must be from 0 to {SHIFTS}, got {low} to {high}")

    @property
    def channels(self) -> int:
        return len(self.exponents)

    @property
    def largest_step(self) -> Tensor:
        return self.scale * torch.exp2(self.exponents).max()


class NoisyQuantizer(OtherGrid):
    """Add a constant to each channel, along the last dimension, round, and take it away again.

    What is rounded is a uniform grid of one scale. A product with a weight W takes W @ noise out of
    its bias instead, so that it multiplies the codes as they are: see `keeping`.

    Source: Liu et al., NoisyQuant, arXiv 2211.16056.
    """

    grid = "noisy"
    made_by = "noisyquant"
    needs = "a vector that is added before rounding, and taken out of the bias behind the product"
    keeps = False
    noise: Tensor  # float32 (channels,)

    def __init__(self, bits: int, kind: str, device: torch.device, channels: int = 1) -> None:
        super().__init__(bits, kind, device)
        noise = torch.zeros(channels, dtype=torch.float32, device=device)
        self.register_buffer("noise", noise)

    def round(self, x: Tensor) -> Tensor:
        noise = self.noise.to(x.dtype)
        rounded = self._round(x + noise)
        return rounded if self.keeps else rounded - noise

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Leave the noise in what is rounded, for a product whose bias makes up for it."""
        self.keeps = True
        try:
            yield
        finally:
            self.keeps = False

    def check_loaded(self, site: str) -> None:
        super().check_loaded(site)
        if not self.noise.isfinite().all():
            raise ValueError(f"{site}.noise must be finite")

    @property
    def channels(self) -> int:
        return len(self.noise)

    @property
    def largest_step(self) -> Tensor:
        return self.step


class UnsignedQuantizer(OtherGrid):
    """Round what is not negative in steps from 0 to the largest value: 2^bits - 1 of them.

    It is a grid with a zero point, of a model whose others are symmetric: the lowest code is 0.

    Source: Ding et al., APQ-ViT, arXiv 2303.14341 (what softmax returns).
    """

    grid = "unsigned"
    made_by = "apq_vit"
    needs = "a zero point"

    def __init__(self, bits: int, kind: str, device: torch.device, channels: int = 1) -> None:
        super().__init__(bits, kind, device)
        self.zero = integer_range(bits)[0]

    def check_loaded(self, site: str) -> None:
        super().check_loaded(site)
        self.zero = integer_range(self.bits)[0]

    def _set_grid(self) -> None:
        self.scale = reference.scale_of(self.absmax, 2**self.bits - 1)

    def _set_range(self) -> None:
        self.absmax = self.scale * (2**self.bits - 1)

    @property
    def largest_step(self) -> Tensor:
        return self.step


class ChannelGroupQuantizer(OtherGrid):
    """Round each channel, along the last dimension, in the steps of its group.

    Source: Bondarenko et al., arXiv 2109.12948, section 4 (per-embedding-group quantization).
    """

    grid = "channel_groups"
    made_by = "peg"
    needs = "a scale for each group of channels"
    steps: Tensor  # float32 (channels,), of which those of a group are equal

    def __init__(self, bits: int, kind: str, device: torch.device, channels: int = 1) -> None:
        super().__init__(bits, kind, device)
        self.register_buffer("steps", torch.ones(channels, dtype=torch.float32, device=device))

    def round(self, x: Tensor) -> Tensor:
        return fake_quant(x, self.steps, self.bits, x.dim() - 1)

    def check_loaded(self, site: str) -> None:
        super().check_loaded(site)
        check_scale(f"{site}.steps", self.steps)

    @property
    def channels(self) -> int:
        return len(self.steps)

    @property
    def largest_step(self) -> Tensor:
        return self.steps.max()


class OutlierColumnQuantizer(OtherGrid):
    """Leave channels in float that reach `threshold` anywhere in a call; round the others by row.

    A row, the last dimension, takes its range from itself, without those channels. They multiply
    with the weight as it was before it was rounded.

    Source: Dettmers et al., LLM.int8(), arXiv 2208.07339, section 3.
    """

    grid = "outlier_columns"
    made_by = "llm_int8"
    needs = "columns in float beside integers, and a scale for each row"
    threshold: Tensor

    def __init__(self, bits: int, kind: str, device: torch.device, channels: int = 1) -> None:
        super().__init__(bits, kind, device)
        threshold = torch.ones((), dtype=torch.float32, device=device)
        self.register_buffer("threshold", threshold)

    def round(self, x: Tensor) -> Tensor:
        outliers = self._outliers(x)
        return torch.where(outliers, x, self._others(x, outliers))

    def linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, exact: Tensor | None = None
    ) -> Tensor:
        if self._passes or exact is None:
            return F.linear(self(x), weight, bias)
        outliers = self._outliers(x)
        y = F.linear(self._others(x, outliers), weight, bias)
        # not F.linear and +, which the functional sites look at
        kept = torch.ops.aten.linear.default(torch.where(outliers, x, 0.0), exact)
        return torch.ops.aten.add.Tensor(y, kept)  # type: ignore[no-any-return]

    def _outliers(self, x: Tensor) -> Tensor:
        """Tell which channels of a call hold an outlier."""
        rows = x.detach().reshape(-1, x.shape[-1])
        return (rows.abs() >= self.threshold).any(0)

    def _others(self, x: Tensor, outliers: Tensor) -> Tensor:
        rows = torch.where(outliers, 0.0, x).reshape(-1, x.shape[-1])
        return dynamic_fake_quant(rows, self.bits, 0).view_as(x)

    def check_loaded(self, site: str) -> None:
        super().check_loaded(site)
        check_scale(f"{site}.threshold", self.threshold)


GRIDS: Mapping[str, type[OtherGrid]] = MappingProxyType(
    {
        grid.grid: grid
        for grid in (
            TwinQuantizer,
            LogQuantizer,
            ChannelShiftQuantizer,
            NoisyQuantizer,
            UnsignedQuantizer,
            ChannelGroupQuantizer,
            OutlierColumnQuantizer,
        )
    }
)


WITH_SCALES = (NoisyQuantizer, UnsignedQuantizer)  # one each, which can be learned


def put(model: nn.Module, site: str, quantizer: nn.Module) -> None:
    """Let a quantizer round a site of a model in place of the one that did."""
    owner, _, name = site.rpartition(".")
    children_of(model.get_submodule(owner))[name] = quantizer


def refuse_other_grids(
    model: nn.Module, but: str, allowed: tuple[type[OtherGrid], ...] = ()
) -> None:
    """Raise a ValueError if a tensor of a model is rounded to one of these grids.

    but: what whoever calls does not do with them. allowed: those that it does it with.
    """
    for site, one in model.named_modules():
        if isinstance(one, OtherGrid) and not isinstance(one, allowed):
            raise ValueError(
                f"{one.made_by} rounds {site} to a {one.grid} grid, which needs {one.needs}: what "
                f"is called here {but}. Quantize the float model without {one.made_by}"
            )


def described_grids(sites: Mapping[str, ActivationQuantizer]) -> dict[str, dict[str, Any]]:
    """Return what a description says of each site with another grid."""
    return {
        site: {"grid": one.grid, "channels": getattr(one, "channels", 1)}
        for site, one in sites.items()
        if isinstance(one, OtherGrid)
    }


def add_described_grids(
    model: nn.Module, sites: Mapping[str, ActivationQuantizer], groups: Mapping[str, Any]
) -> None:
    """Give a model's sites the grids of a description, whose numbers are loaded later.

    Raises:
        ValueError: the model does not round such a site.
    """
    for group in groups.values():
        for site in group["targets"]:
            if site not in sites:
                raise ValueError(f"grid_groups: the model does not round {site!r}")
            one = sites[site]
            made = GRIDS[group["grid"]](one.bits, one.kind, one.scale.device, group["channels"])
            put(model, site, made)
