"""What a quantized Linear is in compressed-tensors: its tensors, and their description."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..fake_quantizer import integer_range
from ..quantization.affine_quantizer import AffineQuantizer
from ..quantization.modules import QuantizedLinear
from ..quantization.quantizer import ActivationQuantizer, WeightQuantizer
from ..quantization.row_quantizers import GroupQuantizer

WORD = 32  # bits of an int32, into which codes are packed


class Format(ABC):
    """A format: what of a Linear it holds, at which widths, and how."""

    name: ClassVar[str]
    sites: ClassVar[tuple[str, ...]]  # that a Linear rounds, if any
    widths: ClassVar[tuple[int, ...]]
    content: ClassVar[str]  # for errors

    @abstractmethod
    def tensors(self, linear: QuantizedLinear) -> dict[str, Tensor]:
        """Return the tensors that take the place of a weight."""

    @abstractmethod
    def arguments(self, linear: QuantizedLinear) -> dict[str, Any]:
        """Return the QuantizationArgs of a Linear's operands."""


class IntQuantized(Format):
    """Weights and inputs of 8 bits: products of integers."""

    name = "int-quantized"
    sites = ("weight_quantizer", "input_quantizer")
    widths = (8,)  # vLLM has no kernel for other widths of both operands
    content = "the format has the inputs and weights of Linear modules alone, at 8 bits"

    def tensors(self, linear: QuantizedLinear) -> dict[str, Tensor]:
        codes, scale = codes_and_scale(linear)
        inputs = linear.input_quantizer
        assert isinstance(inputs, ActivationQuantizer)
        found = {"weight": codes, "weight_scale": scale, "input_scale": inputs.scale.reshape(1)}
        if isinstance(inputs, AffineQuantizer):
            found["input_zero_point"] = inputs.zero_point.reshape(1).to(torch.int8)
        return found

    def arguments(self, linear: QuantizedLinear) -> dict[str, Any]:
        inputs: Any = linear.input_quantizer
        grid = {"num_bits": inputs.bits, "symmetric": inputs.symmetric, "strategy": "tensor"}
        return {"weights": _described(linear), "input_activations": {**_COMMON, **grid}}


class PackQuantized(Format):
    """Weights alone, packed; inputs and products are floats."""

    name = "pack-quantized"
    sites = ("weight_quantizer",)
    widths = tuple(range(2, 9))
    content = "the format has the weights of Linear modules alone, at 2 to 8 bits"

    def tensors(self, linear: QuantizedLinear) -> dict[str, Tensor]:
        codes, scale = codes_and_scale(linear)
        bits: Any = linear.weight_quantizer.bits
        packed = packed_codes(codes, bits)
        return {
            "weight_packed": packed,
            "weight_scale": scale,
            "weight_shape": torch.tensor(codes.shape),
        }

    def arguments(self, linear: QuantizedLinear) -> dict[str, Any]:
        return {"weights": _described(linear)}


_COMMON = {"type": "int", "dynamic": False}


def packed_codes(codes: Tensor, bits: int) -> Tensor:
    """Return int8 codes (outputs, inputs) as int32, `bits` of them for each code, in a row.

    A code counts from the lowest one, and begins where the one before it ends, at the lowest bit
    that is free; the last word of an output is filled up with zeros.
    """
    counted = (codes.to(torch.int16) - integer_range(bits)[0]).to(torch.uint8).numpy()
    digits = np.unpackbits(counted[..., None], axis=-1, count=bits, bitorder="little")
    digits = digits.reshape(len(counted), -1)
    digits = np.pad(digits, ((0, 0), (0, -digits.shape[1] % WORD)))
    words = np.packbits(digits, axis=-1, bitorder="little").view("<i4")
    return torch.from_numpy(words.astype(np.int32))


def codes_and_scale(linear: QuantizedLinear) -> tuple[Tensor, Tensor]:
    """Return a weight as int8, and its scales: of the tensor, or (outputs, 1 or groups)."""
    quantizer = linear.weight_quantizer
    assert isinstance(quantizer, WeightQuantizer)
    weight = linear.weight.detach()
    scale, rounded = quantizer.scale_of(weight), quantizer.round(weight)
    if isinstance(quantizer, GroupQuantizer):
        codes = (quantizer.rows(rounded) / scale.view(-1, 1)).view_as(weight)
    else:
        codes = rounded / scale.reshape(-1, 1)
    shape = (1,) if scale.dim() == 0 else (len(weight), -1)
    return codes.round().to(torch.int8).cpu(), scale.detach().reshape(shape).clone()


def _described(linear: QuantizedLinear) -> dict[str, Any]:
    quantizer: Any = linear.weight_quantizer
    found = {**_COMMON, "num_bits": quantizer.bits, "symmetric": True}
    found["strategy"] = quantizer.granularity
    return found | ({"group_size": quantizer.size} if quantizer.granularity == "group" else {})
