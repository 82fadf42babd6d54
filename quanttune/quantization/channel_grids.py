"""Grids by channel: factors, groups, a noise beneath, channels in float."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F

from ..fake_quantizer import dynamic_fake_quant, fake_quant
from .other_grid import OtherGrid
from .quantizer import check_scale

SHIFTS = 3  # the largest exponent of a channel's factor


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
