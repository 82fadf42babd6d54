"""Grids by value: two ranges, powers of two, no sign."""

from typing import Self

import torch
from torch import Tensor

from .. import reference
from ..fake_quantizer import fake_quant, integer_range
from .other_grid import OtherGrid
from .quantizer import ActivationQuantizer, check_scale


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
