"""A tuner holds on to nothing: no activation, no hook, no memory that grows."""

import gc
import weakref

import pytest
import torch
from memory import growth, linux_memory
from models import BATCH
from oracle import constant, quiet
from torch import nn

import quanttune as qt

MEBIBYTE = 2**20
pytestmark = quiet


@pytest.fixture
def one_thread():
    """Small tensors are slower on more, above all where other processes run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def block() -> nn.Module:
    layers = nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32), nn.LayerNorm(32), nn.Linear(32, 3)
    return nn.Sequential(*layers)


def step(model: nn.Module, tuner: qt.Tuner, x: torch.Tensor) -> None:
    tuner.combine(model(x).square().mean()).backward()
    model.zero_grad()
    tuner.step()


def hooks(model: nn.Module) -> int:
    return sum(
        len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()
    )


def test_activations_are_freed_without_the_cycle_collector():
    model, x = block(), torch.randn(BATCH, 9, 32)
    tuner = constant(model)
    seen: list[weakref.ref] = []
    for module in model:
        module.register_forward_hook(lambda _, args, y: seen.append(weakref.ref(y)))
    step(model, tuner, x)
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            seen.clear()
            step(model, tuner, x)
            assert len(seen) == len(model)
            assert [y for y in seen if y() is not None] == []
    finally:
        gc.enable()


@linux_memory
def test_steps_leave_memory_flat(one_thread):
    model, x = block(), torch.randn(BATCH, 9, 32)
    tuner = constant(model)
    count = hooks(model)
    assert growth(lambda: step(model, tuner, x), 500) < MEBIBYTE
    assert hooks(model) == count


@linux_memory
def test_attaching_and_detaching_leaves_memory_flat(one_thread):
    model, x = block(), torch.randn(BATCH, 9, 32)

    def cycle() -> None:
        tuner = constant(model)
        step(model, tuner, x)
        tuner.detach()

    assert growth(cycle, 125) < MEBIBYTE
    assert hooks(model) == 0
