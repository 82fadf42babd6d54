"""Ctrl-C, wherever it comes, leaves no mode in the thread, and no model half changed."""

import contextlib
import itertools
from functools import partial

import attacks_on_work
import pytest
import torch
from torch import nn

import quanttune as qt
from quanttune.quantization.convert import convert
from quanttune.quantization.functional import modes
from quanttune.quantization.functional.functional_sites import FunctionalSites
from quanttune.quantization.saving.description import describe


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.f = nn.LayerNorm(16), nn.Linear(16, 16)

    def forward(self, x):
        return x + self.f(self.norm(x))


class Interrupted(attacks_on_work.Interrupted):
    """The same in some functions alone, and what they call."""

    def __init__(self, step, *functions):
        super().__init__(step)
        self.codes = {function.__code__ for function in functions}

    def watches(self, frame):
        return bool({frame.f_code, frame.f_back and frame.f_back.f_code} & self.codes)


def test_a_forward():
    model, x = Residual().eval(), torch.randn(2, 5, 16)
    qt.quantize(model, 4, data=[x])
    expected = model(x)
    for step in itertools.count(1):
        interrupted = Interrupted(step, modes._run)
        with contextlib.suppress(KeyboardInterrupt), interrupted:
            assert torch.equal(model(x), expected)
        assert torch._C._len_torch_function_stack() == 0
        assert modes.under_way() is None
        if interrupted.seen < interrupted.left:
            break
    assert step > 10


def state(model):
    return [(type(module), sorted(vars(module))) for module in model.modules()]


@pytest.mark.filterwarnings(
    "ignore:Exception ignored in"
)  # Python drops what a generator's end raises
def test_modules_that_are_swapped():
    x = torch.randn(2, 5, 16)
    for step in itertools.count(1):
        model = Residual().eval()
        before = state(model)
        with Interrupted(step, convert, FunctionalSites.watch, modes.watch) as interrupted:
            try:
                qt.quantize(model, 4, data=[x])
            except KeyboardInterrupt:
                assert state(model) == before
        if interrupted.seen < interrupted.left:
            break
    assert step > 60


@pytest.mark.parametrize("how", ["lsq", "lsq+", "dorefa"])
@pytest.mark.parametrize("call", ["learn", "freeze"])
def test_scales_that_are_learned_or_frozen(call, how):
    """Each place to interrupt it at: all scales are as before, or all are changed."""
    change = partial(qt.learn_scales, how=how) if call == "learn" else qt.freeze_scales

    def fresh():
        torch.manual_seed(0)
        options = {"data": [torch.randn(2, 5, 16)], "symmetric": how != "lsq+"}
        model = qt.quantize(Residual().eval(), 4, **options)
        if call == "freeze":
            qt.learn_scales(model, how)
        return model

    before, whole = fresh(), fresh()
    change(whole)
    for step in itertools.count(1):
        model = fresh()
        interrupted = attacks_on_work.Interrupted(step)
        with contextlib.suppress(KeyboardInterrupt), interrupted:
            change(model)
        assert describe(model) in (describe(before), describe(whole))
        ended = interrupted.seen < step
        assert attacks_on_work.bits(model) == attacks_on_work.bits(
            whole if describe(model) == describe(whole) else before
        )
        if ended:
            break
    assert step > 60
