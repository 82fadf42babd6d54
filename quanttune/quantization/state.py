"""What a quantized model carries: its functional sites, and the quantizers by site."""

from typing import Any

from torch import nn

from .functional.functional_sites import FunctionalSites
from .modules import QuantizedModule, refresh
from .parameters import Parameter, RoundsParameters
from .quantizer import ActivationQuantizer, WeightQuantizer

STATE = "quantization_state"  # the attribute of a quantized model that holds its FunctionalSites


def is_quantized(model: nn.Module) -> bool:
    """Tell whether any module of a model is quantized."""
    ours = (QuantizedModule, RoundsParameters, ActivationQuantizer)
    return any(isinstance(module, ours) for module in model.modules())


def refuse_quantized(model: nn.Module) -> None:
    """Raise a ValueError if any module of a model is quantized."""
    if is_quantized(model):
        raise ValueError(f"{type(model).__name__} is quantized already")


def state_of(model: nn.Module) -> FunctionalSites:
    """Return the functional sites of a quantized model, which hold its scheme."""
    state = vars(model).get(STATE)  # not what a wrapper forwards: its names are others
    if state is None and is_quantized(model):
        raise ValueError(
            f"{type(model).__name__} was made around a quantized model: pass that model, after its "
            "adapters, if they are what is around it, are merged (merge_and_unload)"
        )
    if state is None:
        raise ValueError(
            f"{type(model).__name__} is not quantized: call quantize(model, ...) first"
        )
    return state  # type: ignore[no-any-return]


def quantizers(model: nn.Module) -> dict[str, ActivationQuantizer]:
    """Return the quantizers of a quantized model's activations by site: they hold the scales."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, ActivationQuantizer)
    }


def weight_quantizers(model: nn.Module) -> dict[str, tuple[Any, WeightQuantizer]]:
    """Return what holds the weights that are rounded, and their quantizers, by quantizer.

    A holder has `weight`, `output_axis` and `weight_quantizer`: a quantized module, or a
    `Parameter` of a module that rounds several.
    """
    found: dict[str, tuple[Any, WeightQuantizer]] = {}
    module: Any
    for name, module in model.named_modules():
        holders: dict[str, Any] = {}
        if isinstance(module, QuantizedModule):
            refresh(module)
            holders["weight"] = module
        elif isinstance(module, RoundsParameters):
            holders = {parameter: Parameter(module, parameter) for parameter in module.rounded}
        for parameter, holder in holders.items():
            if isinstance(holder.weight_quantizer, WeightQuantizer):
                site = f"{name}.{parameter}_quantizer".lstrip(".")
                found[site] = holder, holder.weight_quantizer
    return found
