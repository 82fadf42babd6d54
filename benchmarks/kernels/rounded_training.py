"""Models that round the weights and inputs of their Linear modules while they train: ours, those of
other libraries, and plain PyTorch.

What each library does when it is asked for 8 bits, a scale per output channel and, where it can,
one per activation tensor. Ranges are constant, learned, or follow the tensor.
"""

import copy
import math
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import quanttune as qt
from quanttune.fake_quantizer import scale_of
from quanttune.quantization.convert import convert
from quanttune.quantization.scheme import DYNAMIC, Scheme
from quanttune.quantization.state import quantizers, weight_quantizers

Made = tuple[nn.Module, Callable[[], None]]  # and what is called after each step of the optimizer
BITS = 8
HIGHEST = 2 ** (BITS - 1) - 1


def idle() -> None:
    """Do nothing after a step."""


def unrounded(model: nn.Module, batch: Any) -> Made:
    return model, idle


# ------------------------------------------------------------------------------------------- ours


def options(model: nn.Module) -> dict[str, Any]:
    """Return the coverage that all have: Linear modules, and no patch embedding."""
    others = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    return {"coverage": "linear_inputs", "overrides": dict.fromkeys(others)}


def constant(model: nn.Module, batch: Any) -> Made:
    """Ranges of activations as they were calibrated; those of weights follow."""
    return qt.quantize(model, BITS, **options(model), data=[batch]), idle


def learned(model: nn.Module, batch: Any) -> Made:
    """LSQ: every scale is a parameter."""
    qt.quantize(model, BITS, **options(model), data=[batch])
    qt.learn_scales(model)
    return model, idle


def following(model: nn.Module, batch: Any) -> Made:
    """What finishing does, at the sites of the others."""
    scheme = Scheme(BITS, calibrator=DYNAMIC, range_gradient=True, **options(model))
    convert(model, scheme, ExitStack())
    return model, idle


def finishing(model: nn.Module, batch: Any) -> Made:
    """What finishing does: everything is rounded but what softmax returns."""
    tuner = qt.attach(model, total_steps=10**9, finish_steps=10**9, finish_bits=(BITS,))
    return model, tuner.step


OURS = {"constant": constant, "learned": learned, "following": following}


# ----------------------------------------------------------------------------------- plain PyTorch


class PlainLinear(nn.Module):
    """A Linear that rounds in plain PyTorch, with the gradients that ours is to have.

    Terms that are 0 carry them: values are those of the code times the step, to the bit.
    """

    def __init__(self, linear: Any, kind: str, steps: tuple[Tensor | None, Tensor | None]) -> None:
        super().__init__()
        self.weight, self.bias, self.kind = linear.weight, linear.bias, kind
        self.steps = [None if s is None else s.clone().requires_grad_() for s in steps]

    def forward(self, x: Tensor) -> Tensor:
        x = self._round(x, self.steps[0], None)
        return F.linear(x, self._round(self.weight, self.steps[1], 1), self.bias)

    def _round(self, x: Tensor, step: Tensor | None, over: int | None) -> Tensor:
        if step is None:
            largest = x.abs().flatten().max(0) if over is None else x.abs().max(over, keepdim=True)
            step = scale_of(largest.values, BITS)
        elif over is not None:
            step = step[:, None]
        steps = (x / step).detach()
        code = steps.round()
        clipped = code.clamp(-HIGHEST - 1, HIGHEST)
        inside = clipped == code
        if self.kind == "constant":
            step = step.detach()
        if self.kind == "learned":
            per_scale = x.numel() / step.numel()
            step = _scaled_gradient(step, 1 / math.sqrt(per_scale * HIGHEST))
        return clipped * step + inside * ((x - x.detach()) - steps * (step - step.detach()))


def _scaled_gradient(x: Tensor, factor: float) -> Tensor:
    return x.detach() + factor * (x - x.detach())


def plain(model: nn.Module, rounded: nn.Module, kind: str) -> nn.Module:
    """Return a copy of a float model that rounds, in plain PyTorch, as a quantized one of ours."""
    model = copy.deepcopy(model)
    activations, weights = quantizers(rounded), weight_quantizers(rounded)
    for name, (_, quantizer) in weights.items():
        owner = name.removesuffix(".weight_quantizer")
        ranges = activations[f"{owner}.input_quantizer"]
        steps = (
            None if ranges.dynamic else ranges.step,
            None if quantizer.scale is None else quantizer.step,
        )
        linear = PlainLinear(model.get_submodule(owner), kind, steps)
        parent, _, child = owner.rpartition(".")
        setattr(model.get_submodule(parent), child, linear)
    return model


# --------------------------------------------------------------------------------- other libraries


def brevitas(model: nn.Module, batch: Any) -> Made:
    """Scales of activations are parameters, those of weights follow them with a gradient."""
    import brevitas.nn as qnn
    from brevitas.graph.calibrate import calibration_mode
    from brevitas.graph.quantize import layerwise_quantize
    from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerChannelFloat

    options = {"weight_quant": Int8WeightPerChannelFloat, "input_quant": Int8ActPerTensorFloat}
    model = layerwise_quantize(model, {nn.Linear: (qnn.QuantLinear, options)})
    with torch.no_grad(), calibration_mode(model):
        model(**batch)
    return model, idle


def torchao(model: nn.Module, batch: Any) -> Made:
    """A scale and a zero point per token, which is all that it has for activations."""
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    inputs = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
    weights = IntxFakeQuantizeConfig(torch.int8, "per_channel", is_symmetric=True)
    config = QATConfig(activation_config=inputs, weight_config=weights, step="prepare")
    quantize_(model, config)
    return model, idle


def modelopt(model: nn.Module, batch: Any) -> Made:
    """All ranges are constants, those of weights too."""
    import modelopt.torch.quantization as mtq

    config = copy.deepcopy(mtq.INT8_DEFAULT_CFG)
    for kind in ("nn.LayerNorm", "nn.Conv2d"):
        config["quant_cfg"].append({"quantizer_name": "*", "parent_class": kind, "enable": False})
    return mtq.quantize(model, config, lambda found: found(**batch)), idle


RIVALS = {"brevitas": brevitas, "torchao": torchao, "nvidia-modelopt": modelopt}


def roundings(model: nn.Module) -> tuple[int, int]:
    """Count the Linear modules and the others that round a weight, of whichever library."""
    linears = others = 0
    for module in model.modules():
        quantizer = [getattr(module, name, None) for name in _QUANTIZERS]
        if any(q is not None and _is_enabled(q) for q in quantizer):
            linears += isinstance(module, nn.Linear)
            others += not isinstance(module, nn.Linear)
    return linears, others


_QUANTIZERS = "weight_quantizer", "weight_quant", "weight_fake_quantizer"


def _is_enabled(quantizer: Any) -> bool:
    if isinstance(quantizer, nn.Identity):
        return False
    return bool(getattr(quantizer, "is_enabled", getattr(quantizer, "is_quant_enabled", True)))
