"""The quantized twins of the modules that hold weights; a module becomes its twin in place."""

import sys
from functools import cache
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from .quantizer import WeightQuantizer


class Twin:
    """What every twin has: the dimension of its weight's outputs, and quantizers."""

    output_axis = 0
    weight_quantizer: WeightQuantizer | nn.Identity
    input_quantizer: nn.Module
    output_quantizer: nn.Module


class QuantizedLinear(Twin, nn.Linear):
    """Linear: quantized input and weight, float bias, quantized output."""

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(x, self.bias)

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Do what `forward` does, with a bias that is not the module's own."""
        weight = self.weight_quantizer(self.weight)
        return self.output_quantizer(F.linear(self.input_quantizer(x), weight, bias))


class QuantizedConv2d(Twin, nn.Conv2d):
    """Conv2d, such as a patch embedding."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight_quantizer(self.weight)
        return self.output_quantizer(self._conv_forward(self.input_quantizer(x), weight, self.bias))


class QuantizedEmbedding(Twin, nn.Embedding):
    """An embedding table; per channel it has one scale per row."""

    def forward(self, indices: Tensor) -> Tensor:
        # an Identity, where an override leaves the table in float, has no axis
        if getattr(self.weight_quantizer, "axis", 0) is None:
            return F.embedding(indices, self.weight_quantizer(self.weight), self.padding_idx)
        # rows have their own scales, so only those that are looked up need rounding
        rows = F.embedding(indices, self.weight, self.padding_idx)
        return self.weight_quantizer(rows.flatten(0, -2)).view_as(rows)


def twin_of(module: nn.Module) -> Any:
    """Return the quantized class of a module, or None if it has none.

    A subclass counts if it runs the same forward. An embedding that rescales its rows does not.
    """
    if getattr(module, "max_norm", None) is not None:
        return None
    for float_class, twin in _twins().items():
        if isinstance(module, float_class) and type(module).forward is float_class.forward:
            return twin
    return None


@cache
def _quantized_conv1d(conv1d: type[nn.Module]) -> type[nn.Module]:
    """Make the twin of GPT-2's transposed Linear; transformers is an optional dependency."""

    class QuantizedConv1D(Twin, conv1d):  # type: ignore[misc, valid-type]
        output_axis = 1

        def forward(self, x: Tensor) -> Tensor:
            weight = self.weight_quantizer(self.weight)
            y = F.linear(self.input_quantizer(x), weight.t(), self.bias)
            return self.output_quantizer(y)

    return QuantizedConv1D


def _twins() -> dict[type[nn.Module], Any]:
    twins: dict[type[nn.Module], Any] = {
        nn.Linear: QuantizedLinear,
        nn.Conv2d: QuantizedConv2d,
        nn.Embedding: QuantizedEmbedding,
    }
    if transformers := sys.modules.get("transformers.pytorch_utils"):
        twins[transformers.Conv1D] = _quantized_conv1d(transformers.Conv1D)
    return twins
