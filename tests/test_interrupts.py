"""Ctrl-C, wherever it comes, leaves no mode in the thread, and no model half changed."""

import contextlib
import itertools

import attacks_on_work
import pytest
import torch
from torch import nn

import quanttune as qt
from quanttune.quantization.convert import convert
from quanttune.quantization.functional import modes
from quanttune.quantization.functional.functional_sites import FunctionalSites


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
