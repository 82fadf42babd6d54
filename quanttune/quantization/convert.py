"""Put quantizers into a model: in modules that hold weights, around LayerNorms, in functional
sites.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .functional.functional_sites import FunctionalSites
from .modules import (
    QuantizedConvolution,
    QuantizedEmbedding,
    become,
    inputs_of,
    quantized_class_of,
)
from .parameters import Parameter, RoundsParameters, parameter_quantizer, rounding_class_of
from .placement import free_forwards
from .quantizer import is_quantizer
from .scheme import Scheme
from .state import STATE, refuse_quantized


def convert(model: nn.Module, scheme: Scheme, undo: ExitStack) -> FunctionalSites:
    """Swap modules for quantized ones and watch the others, in place; `undo` takes it all back."""
    refuse_quantized(model)
    device = next(chain(model.parameters(), model.buffers()), torch.empty(0)).device
    modules = [(name, m, _covered_class(m, scheme)) for name, m in model.named_modules()]
    if not any(quantized for *_, quantized in modules):
        raise ValueError(
            f"{type(model).__name__} has no Linear, Conv1D, convolution, Embedding, "
            "MultiheadAttention or stack of experts"
        )
    free_forwards(model, undo)
    undo.callback(_drop_quantizers, model)
    # before the modules are, whose quantizers call nothing
    functional = FunctionalSites(model, scheme, device)
    for name, module, quantized in modules:
        if quantized:
            undo.callback(setattr, module, "__class__", type(module))
            _become(name, module, quantized, scheme, device)
        elif isinstance(module, nn.LayerNorm):
            for handle in _wrap_norm(name, module, scheme, device):
                undo.callback(handle.remove)
    functional.watch(undo)
    for _, module, _ in modules:
        # a part is a quantized model too: adapters return the one they hold when they are merged
        if module is model or any(module.children()):
            undo.callback(module.__dict__.pop, STATE, None)
            setattr(module, STATE, functional)
    return functional


def _covered_class(module: nn.Module, scheme: Scheme) -> Any:
    quantized = rounding_class_of(module) or quantized_class_of(module)
    return (
        None if quantized is QuantizedEmbedding and "embedding" not in scheme.kinds else quantized
    )


def _become(name: str, module: Any, quantized: Any, scheme: Scheme, device: torch.device) -> None:
    if issubclass(quantized, RoundsParameters):
        for parameter in quantized.rounded:
            site = f"{name}.{parameter}_quantizer".lstrip(".")
            quantizer = new_weight_quantizer(Parameter(module, parameter), scheme, site)
            module.add_module(f"{parameter}_quantizer", quantizer)
        module.__class__ = quantized
        return
    become(module, quantized)
    site = f"{name}.weight_quantizer".lstrip(".")
    module.weight_quantizer = new_weight_quantizer(module, scheme, site)
    if quantized is QuantizedEmbedding:
        return
    kind = "convolution" if issubclass(quantized, QuantizedConvolution) else "input"
    _add(name, module, "input_quantizer", kind, scheme, device)
    _add(name, module, "output_quantizer", "output", scheme, device)


def new_weight_quantizer(holder: Any, scheme: Scheme, site: str) -> nn.Module:
    """Make what the weight of a quantized module, or a `Parameter`, goes through."""
    if isinstance(holder, Parameter):
        return parameter_quantizer(holder.module, holder.name, scheme, site)
    return scheme.weight_quantizer(site, holder.output_axis, inputs_of(holder))


def _wrap_norm(
    name: str, module: nn.Module, scheme: Scheme, device: torch.device
) -> Iterator[RemovableHandle]:
    """Quantize what goes into a LayerNorm (a residual sum) and what comes out of it."""
    if "residual" in scheme.kinds:
        _add(name, module, "input_quantizer", "residual", scheme, device)
        yield module.register_forward_pre_hook(_quantize_input)
    if "norm" in scheme.kinds:
        _add(name, module, "output_quantizer", "norm", scheme, device)
        # first: a restoration scales what is rounded
        yield module.register_forward_hook(_quantize_output, prepend=True)


def _add(
    owner: str, module: nn.Module, name: str, kind: str, scheme: Scheme, device: torch.device
) -> None:
    site = f"{owner}.{name}".lstrip(".")
    module.add_module(name, scheme.activation_quantizer(site, kind, device))


def _quantize_input(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (module.input_quantizer(args[0]), *args[1:])


def _quantize_output(module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return module.output_quantizer(output)


def _drop_quantizers(model: nn.Module) -> None:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if is_quantizer(name, child):
                delattr(module, name)
