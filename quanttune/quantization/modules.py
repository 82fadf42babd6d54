"""Quantized modules: a module that holds a weight gets one of these classes, in place."""

import copyreg
import sys
from functools import cache
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from .quantizer import ActivationQuantizer, WeightQuantizer

# what computes a weight in a hook, before each forward; it leaves an attribute that is no parameter
_COMPUTED = (WeightNorm, SpectralNorm, BasePruningMethod)

CORRECTION = "correction"  # the child of a Linear or Conv1D that adds to its product: Correction


class QuantizedModule:
    """What every quantized module has: the dimension of its weight's outputs, and quantizers."""

    output_axis = 0
    weight_quantizer: WeightQuantizer | nn.Identity
    input_quantizer: nn.Module
    output_quantizer: nn.Module


class QuantizedLinear(QuantizedModule, nn.Linear):
    """Linear: quantized input and weight, float bias, quantized output."""

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(x, self.bias)

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Do what `forward` does, with a bias that is not the module's own."""
        weight = self.weight
        return self.output_quantizer(_product(self, x, self.weight_quantizer(weight), bias, weight))


class QuantizedTransposed(QuantizedModule):
    """GPT-2's Conv1D, a Linear whose weight is (inputs, outputs)."""

    output_axis = 1
    weight: Tensor
    bias: Tensor

    def forward(self, x: Tensor) -> Tensor:
        weight, exact = self.weight_quantizer(self.weight).t(), self.weight.t()
        return self.output_quantizer(_product(self, x, weight, self.bias, exact))


def _product(module: Any, x: Tensor, weight: Tensor, bias: Tensor | None, exact: Tensor) -> Tensor:
    """Multiply a rounded input, and add what a method added to the module."""
    quantizer, correction = module.input_quantizer, module._modules.get(CORRECTION)
    if correction is None and isinstance(quantizer, ActivationQuantizer):
        return quantizer.linear(x, weight, bias, exact)
    x = quantizer(x)
    y = F.linear(x, weight, bias)
    return y if correction is None else correction(x, y)  # type: ignore[no-any-return]


class QuantizedConvolution(QuantizedModule):
    """What the convolutions share."""

    weight: Tensor
    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight_quantizer(self.weight)
        convolution = self._conv_forward  # type: ignore[attr-defined]
        return self.output_quantizer(convolution(self.input_quantizer(x), weight, self.bias))


class QuantizedConv1d(QuantizedConvolution, nn.Conv1d):
    """Conv1d, such as a frame embedding of speech."""


class QuantizedConv2d(QuantizedConvolution, nn.Conv2d):
    """Conv2d, such as a patch embedding."""


class QuantizedConv3d(QuantizedConvolution, nn.Conv3d):
    """Conv3d, such as a patch embedding of video."""


class QuantizedEmbedding(QuantizedModule, nn.Embedding):
    """An embedding table; per channel it has one scale per row."""

    def forward(self, indices: Tensor) -> Tensor:
        options = self.padding_idx, None, 2.0, self.scale_grad_by_freq, self.sparse
        rows = F.embedding(indices, self.weight, *options)
        # only what is looked up needs rounding, and a gradient that is sparse stays so
        if isinstance(self.weight_quantizer, WeightQuantizer):
            flat = rows.flatten(0, -2), self.weight, indices.flatten()
            return self.weight_quantizer.round_rows(*flat).view_as(rows)
        return rows


def inputs_of(module: Any) -> int | None:
    """Return how many inputs a quantized Linear or Conv1D has; None of other modules."""
    if isinstance(module, (QuantizedLinear, QuantizedTransposed)):
        return int(module.weight.shape[1 - module.output_axis])
    return None


def quantized_class_of(module: nn.Module) -> Any:
    """Return the quantized class of a module, or None if it has none.

    A subclass counts if it runs the same forward. An embedding that rescales its rows does not.
    """
    if getattr(module, "max_norm", None) is not None:
        return None
    for float_class, quantized in _classes().items():
        if isinstance(module, float_class) and type(module).forward is float_class.forward:
            return quantized
    return None


def float_class_of(module: nn.Module) -> type[nn.Module] | None:
    """Return the class that a module is of whose weights could be rounded, whatever its forward."""
    return next((one for one in _classes() if isinstance(module, one)), None)


def become(module: nn.Module, quantized: type) -> None:
    """Give a module its quantized class, in place: whoever holds it or ties its weight sees that.

    Whatever else its own class has stays, such as the weight that a parametrization computes.
    """
    own = type(module)
    if not parametrize.is_parametrized(module):
        module.__class__ = _with_own(quantized, own)
        return
    # torch gives such a module a class of its own, and takes it away when they are removed: so here
    members = {n: v for n, v in vars(own).items() if n not in ("__dict__", "__weakref__")}
    module.__class__ = type(own.__name__, (_with_own(quantized, own.__bases__[0]),), members)


def _with_own(quantized: type, own: type) -> Any:
    return quantized if own in quantized.__mro__ else joined(quantized, own)


@cache
def joined(quantized: type, own: type) -> type:
    """Return a quantized class that has all of a class of users as well."""
    members = {"__module__": quantized.__module__, "made_by": (joined, (quantized, own))}
    kind = Made if type(own) is type else type(own)
    return kind(f"Quantized{own.__name__}", (quantized, own), members)


class Made(type):
    """The class of classes that no file defines: pickled as what they were `made_by`."""

    made_by: tuple[Any, tuple[Any, ...]]


copyreg.pickle(Made, lambda one: one.made_by)  # type: ignore[arg-type]


def refresh(module: Any) -> None:
    """Compute the weight of a module where hooks do so before each forward (pruning, old norms)."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, _COMPUTED) and not module.training:
            hook(module, ())


def holds(module: Any) -> bool:
    """Tell whether a module's weight is a parameter of its own, which a method may write to."""
    return module._parameters.get("weight") is not None and not parametrize.is_parametrized(module)


def _classes() -> dict[type[nn.Module], Any]:
    classes: dict[type[nn.Module], Any] = {
        nn.Linear: QuantizedLinear,
        nn.Conv1d: QuantizedConv1d,
        nn.Conv2d: QuantizedConv2d,
        nn.Conv3d: QuantizedConv3d,
        nn.Embedding: QuantizedEmbedding,
    }
    if transformers := sys.modules.get("transformers.pytorch_utils"):
        classes[transformers.Conv1D] = QuantizedTransposed
    return classes
