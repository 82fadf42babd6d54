"""Refit: every Linear solved anew, so that sums stay in a range and the answers stay."""

import copy
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..masks import Mask
from ..progress import Progress, silent, track
from ..quantization.methods.rounding.linear_systems import ridge as solve_ridge
from ..quantization.running import evaluating, forward_batch
from ..quantization.state import refuse_quantized
from ..quantization.stepped_forward import SteppedForward
from ..transaction import transaction
from .clamping import Clamp, clamps_of
from .route import Route, route_of
from .stops import Stop, Stops, stopping_modules


@torch.no_grad()
def refit(
    model: nn.Module,
    data: Iterable[Any],
    *,
    clamp: Clamp = None,
    tolerance: float = 0.1,
    ridge: float = 1e-3,
    mask: Mask | None = "attention_mask",
    progress: Progress = silent,
) -> nn.Module:
    """Solve the Linear modules of a float model anew, in place, and return it.

    Layer by layer, from the inputs that the refitted model makes, each gives what the original gave
    there; where its output is added to something, the sum is the original's, clamped to a range. So
    the few huge values that a model needs nowhere are gone without a step of training, and the
    layers behind make up for what else changed. Embeddings, norms and convolutions stay.

    All batches are on their way at once, in the model and in a copy of it: that takes the memory of
    their hidden states twice. Each layer also takes (inputs + 1)^2 + inputs * outputs float64.

    Args:
        model: any model of Linear modules. A weight that several modules hold stays as it is, and
            so does a module that is called twice.
        data: batches of inputs, as `quantize` takes them; some tens of thousands of tokens.
        clamp: the range of the sums, +- a number; or numbers by patterns (fnmatch) of the names of
            the modules that are added, where others are not clamped. By default it is measured:
            a multiple of each sum's root mean square, as small as `tolerance` allows.
        tolerance: how far the original's output may move by that, as the norm of the difference
            over the norm.
        ridge: what holds a weight where it is, in units of the mean square of a layer's inputs.
        mask: which tokens are padding, as in `attach`; they take no part.

    Raises:
        ValueError: data is empty, the model is quantized, or its batches take different ways.

    Source: ridge regression as in ERQ (Zhong et al., arXiv 2407.06794), to the aim of QuantTune.
    """
    refuse_quantized(model)
    batches = list(data)
    if not batches:
        raise ValueError("data is empty: refit needs at least one batch of inputs")
    with transaction(model) as undo, evaluating(model):
        original = copy.deepcopy(model)
        undo.callback(model.load_state_dict, original.state_dict())
        route = route_of(original, batches[0], mask)
        clamps = clamps_of(original, batches[0], mask, route, clamp, tolerance)
        with ExitStack() as end:
            students = _forwards(model, batches, mask, route, partial(_refitted, model))
            teachers = _forwards(original, batches, mask, route, lambda stop: stop.output)
            for forward in (*students, *teachers):
                forward.stop_at_the_end_of(end)
            for name in track(route.names, "refitting", progress):
                module: Any = model.get_submodule(name)
                equations = _Equations(module)
                for student, teacher in zip(students, teachers, strict=True):
                    equations.add(_reach(student, name), _reach(teacher, name), clamps.get(name))
                equations.solve(ridge)
    return model


def _refitted(model: nn.Module, stop: Stop) -> Tensor:
    """Return what a Linear gives by now."""
    module: Any = model.get_submodule(stop.name)
    return nn.functional.linear(stop.x, module.weight, module.bias)


def _forwards(
    model: nn.Module,
    batches: Iterable[Any],
    mask: Mask | None,
    route: Route,
    goes_on: Callable[[Stop], Tensor],
) -> list[SteppedForward[Stop]]:
    """Return the forwards of all batches, which go on with the outputs that `goes_on` returns."""
    names = stopping_modules(model, route.names)
    return [_stepped(model, batch, mask, names, route, goes_on) for batch in batches]


def _stepped(
    model: nn.Module,
    batch: Any,
    mask: Mask | None,
    names: Mapping[int, str],
    route: Route,
    goes_on: Callable[[Stop], Tensor],
) -> SteppedForward[Stop]:
    def at(stop: Stop) -> Tensor:
        forward.wait_at(stop)
        return goes_on(stop)

    @torch.no_grad()
    def run() -> None:
        with Stops(names, route.scales, at):
            forward_batch(model, batch, mask)

    forward: SteppedForward[Stop] = SteppedForward(run)
    return forward


def _reach(forward: SteppedForward[Stop], name: str) -> Stop:
    stop = forward.advance()
    if stop is None or stop.name != name:
        raise ValueError(
            f"a batch comes to {stop.name if stop else 'the end'} where the first one comes to "
            f"{name}: refit needs batches that take the same way through the model"
        )
    return stop


class _Equations:
    """What a Linear is given, and what its output lacks: the normal equations of the change."""

    def __init__(self, module: Any) -> None:
        self.module = module
        size = module.in_features + (module.bias is not None)
        options = {"dtype": torch.float64, "device": module.weight.device}
        self.moments = torch.zeros(size, size, **options)
        self.products = torch.zeros(size, module.out_features, **options)

    def add(self, student: Stop, teacher: Stop, limit: float | None) -> None:
        wanted = teacher.output
        if teacher.other is not None and student.other is not None:
            total = wanted + teacher.other
            wanted = (total if limit is None else total.clamp(-limit, limit)) - student.other
        x, lacks = (_rows(t, student.counted) for t in (student.x, wanted - student.output))
        if self.module.bias is not None:
            x = torch.cat([x, x.new_ones(len(x), 1)], 1)
        self.moments += x.T @ x
        self.products += x.T @ lacks

    def solve(self, ridge: float) -> None:
        mean_square = self.moments.diagonal().mean().item()
        if not mean_square:
            return  # inputs of zeros tell nothing
        change = solve_ridge(self.moments, self.products, ridge * mean_square)
        inputs = self.module.in_features
        self.module.weight += change[:inputs].T.to(self.module.weight)
        if self.module.bias is not None:
            self.module.bias += change[inputs].to(self.module.bias)


def _rows(x: Tensor, counted: Tensor | None) -> Tensor:
    rows = x.flatten(0, -2).double()
    return rows if counted is None else rows[counted]
