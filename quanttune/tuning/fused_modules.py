"""LayerNorm and activation modules that observe themselves, in the kernel that they run anyway.

Only a forward of their own can do that. While a module is fused, its class is a subclass that hands
the call to the observers; a copy of the module, and what is pickled of it, has its class again.
"""

import sys
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakTensorKeyDictionary

from .. import ops
from .hooks import Hook
from .observation import Context, Observation


def is_plain_norm(module: nn.Module) -> bool:
    """Tell whether this is a LayerNorm of the last dimension that does nothing else."""
    return (
        isinstance(module, nn.LayerNorm)
        and type(module).forward in _plain_norms()
        and len(module.normalized_shape) == 1
        and not getattr(module, "_fast_norm", False)  # timm.layers.set_fast_norm: another kernel
    )


def _plain_norms() -> list[Any]:
    timm = sys.modules.get("timm.layers.norm")
    return [nn.LayerNorm.forward, *([timm.LayerNorm.forward] if timm else [])]


def kind_of(module: nn.Module) -> str | None:
    """Return which observed activation computes the same as this module, if one does."""
    if type(module) is nn.ReLU:
        return None if module.inplace else "relu"
    if type(module) is nn.GELU:
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    if transformers := sys.modules.get("transformers.activations"):
        kinds = {transformers.GELUActivation: "gelu", transformers.NewGELUActivation: "gelu_tanh"}
        return kinds.get(type(module))
    return None


def fits(module: nn.LayerNorm, x: Tensor) -> bool:
    """Tell whether LayerNorm of x is what the kernel computes: all of one type, uncast."""
    weight = module.weight
    recast = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float32
    return not recast and (weight is None or weight.dtype == x.dtype)


class Activations:
    """Which activations are fused: those whose result is what a site reads, once that is known."""

    def __init__(self) -> None:
        self.fused: set[str] = set()
        self.deferred: set[str] = set()  # the sites whose result only they observe
        self._fed_by: dict[str, set[str]] = {}
        self._made = WeakTensorKeyDictionary()
        self._feeding: set[str] = set()

    def fuse(self, model: nn.Module, forward: Any) -> list["Handle"]:
        """Hand the calls of all activations of a model to `forward`."""
        return [
            Handle(module, Hook(forward, name, kind))
            for name, module in model.named_modules()
            if (kind := kind_of(module))
        ]

    def learn(self, name: str, site: str, y: Tensor) -> Tensor:
        """Note that an activation has made y of what came from a site."""
        self._fed_by.setdefault(name, set()).add(site)
        self._made[y] = name
        return y

    def meet(self, x: Tensor) -> None:
        """Note that a site reads x."""
        if name := self._made.get(x):
            self._feeding.add(name)

    def start(self) -> None:
        """Fuse those that were seen between two sites; nobody learns any more."""
        for name in self._feeding - self.fused:
            self.fused.add(name)
            self.deferred |= {s for s in self._fed_by[name] if s.endswith(".output")}


def _new(plain: type[nn.Module]) -> nn.Module:
    return plain.__new__(plain)


class FusedModule:
    """The forward of a module that observes itself. The hook gets what it would do otherwise."""

    _plain_class: type[nn.Module]
    _observe_forward: Hook

    def forward(self, input: Tensor) -> Tensor:
        return self._observe_forward(self, super().forward, input)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        state = {name: value for name, value in vars(self).items() if name != "_observe_forward"}
        return _new, (self._plain_class,), state


@cache
def _fused_class(plain: type[nn.Module]) -> type[nn.Module]:
    return type(plain.__name__, (FusedModule, plain), {"_plain_class": plain})


class Handle:
    """Fuse a module with its observation; `remove` gives it its class back."""

    def __init__(self, module: nn.Module, hook: Hook) -> None:
        self.module = module
        vars(module)["_observe_forward"] = hook
        module.__class__ = _fused_class(type(module))  # type: ignore[arg-type]

    def remove(self) -> None:
        self.module.__class__ = self.module._plain_class  # type: ignore[assignment]
        del vars(self.module)["_observe_forward"]


def _note(ctx: Any, context: Context, observations: Any, statistics: Any) -> None:
    """Keep the statistics of x and y, of which the first may have been observed elsewhere."""
    ctx.observed = context, observations, statistics
    for observation, rows in zip(observations, statistics, strict=True):
        if observation is not None:
            observation.statistics = rows


def _terms(ctx: Any) -> tuple[Any, ...]:
    """Return the last arguments of the backward ops."""
    context, observations, statistics = ctx.observed
    ratio_grads = []
    for observation, rows in zip(observations, statistics, strict=True):
        multiplicity = 0
        if observation is not None:
            observation.awaits_gradient = False
            multiplicity = observation.multiplicity
        ratio_grad = context.upstream.ratio_grad(multiplicity, rows)
        ratio_grads.append(context.loss.weigh(ratio_grad, rows))
    return (*statistics, *ratio_grads, context.loss.exact, context.loss.detach_deviation)


class FusedLayerNorm(torch.autograd.Function):
    """LayerNorm, which observes x where that has an observation, and y."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        before: Observation | None,
        after: Observation,
        context: Context,
    ) -> Tensor:
        y, mean, rstd, *statistics = context.kernels.observed_layer_norm(
            x, weight, bias, eps, after.samples, context.loss.exact
        )
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.eps = eps
        _note(ctx, context, (before, after), statistics)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        gradients = ops.observed_layer_norm_backward(
            grad, x, weight, bias, ctx.eps, mean, rstd, *_terms(ctx)
        )
        wanted = zip(gradients, ctx.needs_input_grad, strict=False)
        return (*(gradient if needed else None for gradient, needed in wanted), *[None] * 4)


class FusedActivation(torch.autograd.Function):
    """An activation, which observes x where that has an observation, and y."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        kind: str,
        before: Observation | None,
        after: Observation,
        context: Context,
    ) -> Tensor:
        y, *statistics = context.kernels.observed_activation(
            x, kind, after.samples, context.loss.exact
        )
        ctx.save_for_backward(x)
        ctx.kind = kind
        _note(ctx, context, (before, after), statistics)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        total = ops.observed_activation_backward(grad, x, ctx.kind, *_terms(ctx))
        return total, None, None, None, None
