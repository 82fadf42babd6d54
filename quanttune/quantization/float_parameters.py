"""The large parameters that no quantizer of a module rounds, and why."""

from torch import nn

from .correction import Correction
from .grid import Grid
from .modules import CORRECTION, QuantizedModule, float_class_of
from .outliers import Outliers
from .parameters import Parameter, RoundsParameters
from .state import state_of, weight_quantizers

SHARE = 0.01  # of all parameters: what is smaller is not listed
NEVER = "biases, and what a LayerNorm scales by, stay float"
OVERRIDE = "an override leaves it in float"
COVERAGE = "the coverage leaves embeddings in float"


def float_parameters(model: nn.Module) -> dict[str, str]:
    """Return the parameters of a quantized model that stay float, with reasons, largest first.

    Those that hold less than 1 % of the model's numbers are left out.

    Raises:
        ValueError: the model is not quantized.
    """
    state_of(model)
    rounded = _rounded(model)
    ours = {id(p) for q in model.modules() if isinstance(q, Grid) for p in q.parameters(False)}
    found = {n: p for n, p in model.named_parameters() if p.is_floating_point()}
    found = {n: p for n, p in found.items() if id(p) not in ours}
    total = sum(p.numel() for p in found.values())
    large = {n: p for n, p in found.items() if p.numel() > SHARE * total and id(p) not in rounded}
    names = sorted(large, key=lambda name: -large[name].numel())
    return {name: _reason(name, model) for name in names}


def rounded_parameters(model: nn.Module) -> int:
    """Return how many numbers the parameters of a quantized model hold that are rounded."""
    rounded = _rounded(model)
    return sum(p.numel() for p in model.parameters() if id(p) in rounded)


def is_asked_for(reason: str) -> bool:
    """Tell whether a reason is what the user chose, or what every model has."""
    return reason in (OVERRIDE, COVERAGE, NEVER)


def _rounded(model: nn.Module) -> set[int]:
    rounded = set()
    for holder, _ in weight_quantizers(model).values():
        # a weight that is computed, by a parametrization or a hook, is rounded afterwards
        owned = [holder.weight] if isinstance(holder, Parameter) else _sources(holder)
        rounded |= {id(parameter) for parameter in owned}
    for _, calls in state_of(model).calls():
        names = {operation.parameter for operation in calls.operations.values()}
        rounded |= {id(model.get_parameter(name)) for name in names if name}
    return rounded


def _sources(quantized: nn.Module) -> list[nn.Parameter]:
    """Return what a quantized module's weight is, or is computed from."""
    others = ("bias", *(f"{CORRECTION}.{name}" for name in ("down", "up")))
    return [
        p
        for name, p in quantized.named_parameters()
        if name not in others and "quantizer" not in name
    ]


def _reason(name: str, model: nn.Module) -> str:
    owner, _, parameter = name.rpartition(".")
    module = model.get_submodule(owner)
    kind = type(module).__name__
    if parameter == "bias" or isinstance(module, nn.LayerNorm):
        return NEVER
    if isinstance(module, Correction):
        return "a method adds it in float"
    if isinstance(module, Outliers):
        return "a method keeps these weights in float"
    if isinstance(module, (QuantizedModule, RoundsParameters)):
        own = f"{parameter}_quantizer"
        return OVERRIDE if hasattr(module, own) else f"{kind} adds it"
    if isinstance(module, nn.Embedding):
        scaled = module.max_norm is not None
        return "max_norm rescales its rows" if scaled else COVERAGE
    if known := float_class_of(module):
        return f"{kind} has a forward of its own, not that of {known.__name__}"
    return f"{kind} is none of the classes whose weights are rounded"
