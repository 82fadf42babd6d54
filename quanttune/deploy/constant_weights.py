"""Weights as PyTorch's own quantization holds them, which its compilers and ExecuTorch look for."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..fake_quantizer import integer_range
from ..quantization.modules import QuantizedConvolution, QuantizedEmbedding
from ..quantization.quantizer import WeightQuantizer
from .integer_weights import (
    MAX_INTEGER_BITS,
    IntegerLinear,
    IntegerParameter,
    IntegerWeight,
    Layout,
)


class Constant(nn.Module):
    """Codes, and a scale and a zero point for each index of their first dimension, as buffers.

    Runtimes pack weights before anything runs: what an operation makes is no constant to them.
    """

    codes: Tensor
    scales: Tensor
    zero_points: Tensor

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        super().__init__()
        rows = codes.shape[:1]
        # of int64, as PyTorch's own are, torch.compile warns that it copies a tensor
        zeros = torch.zeros(rows, dtype=torch.int32, device=codes.device)
        self.register_buffer("codes", codes.contiguous())
        self.register_buffer("scales", scale.detach().expand(rows).contiguous())
        self.register_buffer("zero_points", zeros)

    def forward(self, _: Tensor | None = None) -> Tensor:
        """Return the weight in float; the one that is given is not looked at."""
        dequantize = torch.ops.quantized_decomposed.dequantize_per_channel.default
        return dequantize(self.integers(), *self.grid())  # type: ignore[no-any-return]

    def integers(self) -> Tensor:
        """Return the codes."""
        return self.codes

    def grid(self) -> tuple[Any, ...]:
        """Return what the ops take behind codes or a weight."""
        limits = integer_range(MAX_INTEGER_BITS)
        return self.scales, self.zero_points, 0, *limits, torch.int8


class Rerounded(Constant):
    """The same as floats that the program rounds: LiteRT's converter takes no stored codes."""

    weight: Tensor

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        super().__init__(codes, scale)
        steps = self.scales.view(-1, *[1] * (codes.dim() - 1))
        self.register_buffer("weight", self.codes * steps)
        del self.codes

    def integers(self) -> Tensor:
        quantize = torch.ops.quantized_decomposed.quantize_per_channel.default
        return quantize(self.weight, *self.grid())  # type: ignore[no-any-return]


class Rounded(nn.Module):
    """A weight that meets floats, or has more than 8 bits: the floats that it was rounded to."""

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight.detach().contiguous())

    def forward(self, _: Tensor | None = None) -> Tensor:
        return self.weight


class ConstantParameter(IntegerParameter):
    """The codes and scales of a parameter that a module multiplies with by itself."""

    kind = Constant

    def __init__(self, weight: Tensor, quantizer: WeightQuantizer, dtype: str) -> None:
        super().__init__(weight, quantizer, dtype)
        if self.is_integer:
            self.held = self.kind(self.codes, self.scale)
            del self.codes, self.scale

    def dequantized(self) -> Tensor:
        return self.held()  # type: ignore[no-any-return]


class ReroundedParameter(ConstantParameter):
    kind = Rerounded


class ConstantLinear(IntegerLinear):
    """Linear or Conv1D as aten.linear, whose weight is (outputs, inputs)."""

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        # not F.linear: see IntegerLinear
        product = torch.ops.aten.linear.default
        y = product(self.input_quantizer(x), self.weight_quantizer(), bias)
        return self.output_quantizer(y)  # type: ignore[no-any-return]


def constant_weight(
    module: Any, quantizer: WeightQuantizer, dtype: str, kind: type[Constant] = Constant
) -> nn.Module:
    """Return what stands for the weight of a module."""
    held = IntegerWeight(module, quantizer, dtype)
    if isinstance(module, QuantizedEmbedding):
        return held
    is_linear = not isinstance(module, QuantizedConvolution)
    if held.is_integer and held.meets_integers:
        return kind(held.codes.t() if is_linear else held.codes, held.scale)
    return Rounded(quantizer(module.weight.detach()).movedim(module.output_axis, 0))


CONSTANTS = Layout(constant_weight, ConstantParameter, ConstantLinear)
REROUNDED = Layout(partial(constant_weight, kind=Rerounded), ReroundedParameter, ConstantLinear)
