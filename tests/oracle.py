"""Eqs. 2 and 3 in plain PyTorch, and the comparisons of the tests of tuning."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from models import BATCH, MODELS, Example
from torch import Tensor, nn

import quanttune as qt
from quanttune.losses import Ratio
from quanttune.tuning.observers import Observers
from quanttune.tuning.sites import find_heads, find_sites

# Relative error of each parameter's gradient, by norm. The model runs in float32 with either loss,
# and gradients only meet in another order: measured below 1e-6.
TOLERANCE = 1e-5


quiet = pytest.mark.filterwarnings("ignore:the outlier term's gradient norm")
each_model = pytest.mark.parametrize("name", MODELS)


class Oracle:
    """Eq. 2 by plain hooks on every Linear and LayerNorm, with autograd all the way.

    cost: what a ratio costs. cost_of_rows: what the rows of a tensor cost, instead of their ratios.
    """

    def __init__(
        self,
        model: nn.Module,
        heads: Sequence[str],
        only: Sequence[str] | None = None,
        detach_deviation: bool = False,
        cost: Callable[[Tensor], Tensor] = lambda ratio: ratio,
        cost_of_rows: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.detach_deviation = detach_deviation
        self.cost, self.cost_of_rows = cost, cost_of_rows
        self.ratios: list[Tensor] = []
        self.batch = BATCH
        self.handles = []
        for name, module in model.named_modules():
            if isinstance(module, (nn.Linear, nn.LayerNorm)) and (only is None or name in only):
                hook = module.register_forward_pre_hook(lambda _, args: self.see(args[0]))
                self.handles.append(hook)
                if name not in heads:
                    hook = module.register_forward_hook(lambda *call: self.see(call[2]))
                    self.handles.append(hook)

    def see(self, x: Tensor) -> None:
        rows = x.reshape(1 if x.shape[0] == 1 else self.batch, -1).double()
        if self.cost_of_rows:
            self.ratios.append(self.cost_of_rows(rows).mean())
            return
        magnitude = rows.abs()
        median = magnitude.median(1, keepdim=True).values.detach()
        # amax shares the gradient among ties, which bfloat16 has many of
        median = torch.where(magnitude <= median, magnitude, 0).amax(1)
        deviation = rows.std(1)
        if self.detach_deviation:
            deviation = deviation.detach()
        self.ratios.append(self.cost((magnitude.amax(1) - median) / deviation).mean())

    def combine(self, task: Tensor, alpha: float) -> Tensor:
        outlier, self.ratios = torch.stack(self.ratios).mean(), []
        return (1 - alpha) * task + alpha * outlier

    def __enter__(self) -> "Oracle":
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def expected_step(example: Example, alpha: float, **options) -> tuple[Tensor, dict[str, Tensor]]:
    with Oracle(example.model, example.heads, **options) as oracle:
        loss = oracle.combine(example.task_loss(), alpha)
    return loss.detach(), gradients(example.model, loss)


def assert_near(actual: dict, expected: dict, tolerance: float = TOLERANCE) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        error = (actual[name] - gradient).norm()
        assert error <= tolerance * gradient.norm(), f"{name}: {error / gradient.norm()}"


def assert_same_bits(actual: dict, expected: dict) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def constant(model: nn.Module, alpha: float = 0.3, **options) -> qt.Tuner:
    return qt.attach(model, alpha, "constant", **options)


@contextmanager
def observing(model: nn.Module) -> Iterator[Observers]:
    sites = find_sites(model), find_heads(model)
    observers = Observers(model, *sites, Ratio())
    yield observers
    observers.remove()
