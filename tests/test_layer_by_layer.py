"""Forwards that go on together give what one pass per layer gives, bit for bit."""

import copy
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from equalized import EXAMPLES
from oracle import assert_same_bits
from torch import Tensor, nn

import quanttune as qt
from quanttune.quantization.methods.rounding import layer_by_layer
from quanttune.quantization.methods.rounding.moments import Moments, groups_of, sums_of
from quanttune.quantization.running import Data
from quanttune.quantization.stepped_forward import SteppedForward

OPTIONS = {"bits": 4, "weight_bits": 3}


def alone(model, groups, data, make, visit, what):
    """Visit groups as run_layer_by_layer does, by a pass for each."""
    for group in groups:
        visit(group, *sums_of(model, [group], data, make))


@pytest.mark.parametrize("method", ["gptq", "bias_correction"])
@pytest.mark.parametrize("name", EXAMPLES)
def test_equals_a_pass_for_each_layer(name, method, monkeypatch):
    example = EXAMPLES[name]()
    model = example.model.train()
    data = example.inputs.split(2)
    models = []
    for walk in (layer_by_layer.run_layer_by_layer, alone):
        for module in ("rounding.layer_by_layer", "bias_correction"):
            monkeypatch.setattr(f"quanttune.quantization.methods.{module}.run_layer_by_layer", walk)
        quantized = copy.deepcopy(model)
        models.append(qt.quantize(quantized, **OPTIONS, methods=[method], data=data))
    assert_same_bits(*(model.state_dict() for model in models))
    assert all(module.training for model in models for module in model.modules())


@pytest.mark.parametrize("name", ["vit", "bert", "opt"])
def test_each_batch_runs_once(name):
    example = EXAMPLES[name]()
    model, data = example.model.eval(), example.inputs.split(1)
    qt.quantize(model, 8, data=data)
    groups, calls, seen = groups_of(model, Data(data)), [], []
    model.register_forward_pre_hook(lambda *_: calls.append(threading.get_ident()))
    layer_by_layer.run_layer_by_layer(
        model, groups, Data(data), Moments, lambda group, _: seen.append(group), ""
    )
    assert seen == groups
    assert len(set(calls)) == len(calls) == len(data)


class Forked(nn.Module):
    """Takes another way, and another order, for inputs that are negative."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.extra, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        negative = bool((x < 0).all())
        x = self.first(x).tanh()
        x = self.one(self.other(x).sin()) if negative else self.other(self.extra(self.one(x)).sin())
        return self.last(x)


def test_batches_that_take_different_ways_are_passed_for_each_layer(monkeypatch):
    model = Forked()
    data = [torch.rand(3, 4), -torch.rand(5, 4), torch.rand(2, 4)]
    found = qt.quantize(copy.deepcopy(model), **OPTIONS, methods=["gptq"], data=data)
    monkeypatch.setattr(
        "quanttune.quantization.methods.rounding.layer_by_layer.run_layer_by_layer", alone
    )
    expected = qt.quantize(copy.deepcopy(model), **OPTIONS, methods=["gptq"], data=data)
    assert_same_bits(found.state_dict(), expected.state_dict())


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads as Linux lists them")
def test_a_waiting_forward_holds_one_thread_and_not_one_per_core(with_threads):
    counts = []

    def threads():
        return len(list(Path("/proc/self/task").iterdir()))

    class Counting(nn.Module):
        def forward(self, x):
            counts.append(threads())
            return x.exp().log()  # large enough for all threads

    with_threads(4)
    model = nn.Sequential(Counting(), nn.Linear(256, 256), Counting(), nn.Linear(256, 8)).eval()
    before = threads()
    data = [torch.randn(1024, 256) for _ in range(20)]
    qt.quantize(model, 4, methods=["gptq"], data=data)
    assert before + 20 <= max(counts) <= before + 20 + 4


def test_where_threads_run_out_it_is_a_pass_for_each_layer(monkeypatch):
    model = Forked()
    data = [torch.rand(3, 4), torch.rand(5, 4), torch.rand(2, 4)]
    expected = qt.quantize(copy.deepcopy(model), **OPTIONS, methods=["gptq"], data=data)
    before, start, begun = threading.active_count(), threading.Thread.start, []

    def two(thread):
        if len(begun) == 2:
            raise RuntimeError("can't start new thread")
        begun.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", two)
    found = qt.quantize(copy.deepcopy(model), **OPTIONS, methods=["gptq"], data=data)
    assert len(begun) == 2
    assert threading.active_count() == before
    assert_same_bits(found.state_dict(), expected.state_dict())


def test_a_forward_has_a_thread_from_its_first_step_on():
    before = threading.active_count()
    forward = SteppedForward(lambda: forward.wait_at("here"))
    assert threading.active_count() == before  # nobody would stop it after an interrupt
    assert forward.advance() == "here"
    forward.stop()
    SteppedForward(int).stop()
    assert threading.active_count() == before


def test_an_error_within_a_forward_is_raised_and_leaves_no_thread():
    model = Forked()
    data = [torch.rand(3, 4), torch.rand(2, 4)]
    qt.quantize(model, 8, data=data)
    groups = groups_of(model, Data(data))
    before, seen = threading.active_count(), []

    def fail(*_):
        if seen:
            raise RuntimeError("out of memory, say")

    hook = model.last.register_forward_pre_hook(lambda *_: fail())
    hooks = len(model.one._forward_pre_hooks)
    with pytest.raises(RuntimeError, match="out of memory, say"):
        layer_by_layer.run_layer_by_layer(
            model, groups, Data(data), Moments, lambda group, _: seen.append(group), ""
        )
    assert threading.active_count() == before
    assert len(model.one._forward_pre_hooks) == hooks
    assert len(seen) == 4
    hook.remove()
    with pytest.raises(ZeroDivisionError):
        layer_by_layer.run_layer_by_layer(model, groups, Data(data), Moments, lambda *_: 1 / 0, "")
    assert threading.active_count() == before


def test_a_quantized_model_is_called_by_several_threads():
    example = EXAMPLES["bert"]()
    model = qt.quantize(example.model.eval(), 8, coverage="full", data=[example.inputs])
    words = example.inputs.repeat(3, 1)[torch.randperm(12)]
    with torch.no_grad():
        expected = [model(x).logits for x in words.split(1)]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            found = list(pool.map(lambda x: model(x).logits.detach(), words.split(1)))
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
