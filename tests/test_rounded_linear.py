"""Linear modules of quantized models in training: their gradients, and what they keep."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import quanttune as qt
from quanttune import ops
from quanttune.quantization.state import quantizers

FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def model_of(kind):
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))
    data = [torch.randn(4, 8) for _ in range(2)]  # less than is trained on: some is clipped
    if kind == "dynamic":
        return qt.quantize(model, 4, calibrator="dynamic")
    qt.quantize(model, 4, symmetric=kind != "affine", coverage="linear_inputs", data=data)
    if kind == "learned":
        qt.learn_scales(model)
    return model


def apart(model):
    """Return a copy whose activations are rounded by themselves: a hook wants to see them."""
    model = copy.deepcopy(model)
    for quantizer in quantizers(model).values():
        quantizer.register_forward_hook(lambda *_: None)
    return model


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", ["constant", "affine", "learned", "dynamic"])
def test_answers_and_gradients_are_those_of_rounding_and_multiplying(kind, autocast):
    model = model_of(kind).train()
    results = []
    for one in (model, apart(model)):
        x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = one(3 * x)
        y.float().square().sum().backward()
        results.append((y, x.grad, *(p.grad for p in one.parameters())))
    ours, theirs = results
    assert torch.equal(ours[0], theirs[0])
    for mine, other in zip(ours[1:], theirs[1:], strict=True):
        assert mine.dtype == other.dtype
        assert (mine - other).norm() <= (1e-2 if autocast else 1e-6) * other.norm()


def test_a_model_that_trains_range_gradients_has_those_of_rounding_and_multiplying():
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))
    qt.attach(model, total_steps=1, finish_steps=1, finish_bits=(4,))
    grads = []
    for is_apart in (False, True):
        if is_apart:
            for quantizer in quantizers(model).values():
                quantizer.register_forward_hook(lambda *_: None)
        x = torch.randn(3, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
        model.zero_grad()
        model(x).square().sum().backward()
        grads.append([x.grad, *(p.grad.clone() for p in model.parameters())])
    for mine, other in zip(*grads, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["constant", "affine", "learned", "dynamic"])
def test_rounded_inputs_are_not_kept(kind):
    model = model_of(kind)[0].train()
    x, kept = torch.randn(100, 8), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = model(x)
    if kind != "dynamic":  # that rounds its output too
        assert {t.data_ptr() for t in kept if t.numel() == x.numel()} == {x.data_ptr()}
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        apart(model)(x)
    assert y.requires_grad
    assert {t.data_ptr() for t in kept if t.numel() == x.numel()} != {x.data_ptr()}


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_change_no_gradient(reentrant):
    model = model_of("learned").train()
    x = torch.randn(6, 8, requires_grad=True)
    grads = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=reentrant)):
        model.zero_grad()
        run(x).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(map(torch.equal, *grads))


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.functions = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.functions.add(func)
        return func(*args, **(kwargs or {}))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.all, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        query, key, value = self.all(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.out(y.transpose(1, 2).flatten(2))


def test_attention_that_stays_in_float_is_pytorchs_in_training():
    x, model = torch.randn(2, 6, 8), Attention()
    for coverage, is_fused in (("linear_inputs", True), ("linear", False)):
        quantized = qt.quantize(copy.deepcopy(model), 8, coverage=coverage, data=[x])
        with torch.no_grad():
            expected = quantized(x)
        with Seen() as seen:
            y = quantized.train()(x)
        assert (FUSED in seen.functions) == is_fused
        torch.testing.assert_close(y, expected)


def test_a_weight_is_rounded_once_between_two_steps_of_the_optimizer(monkeypatch):
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))
    other = copy.deepcopy(model)
    rounded, own = [], ops.dynamic_fake_quant
    monkeypatch.setattr(
        ops,
        "dynamic_fake_quant",
        lambda x, *grid: rounded.append(grid) or own(x, *grid),
    )
    ended = []
    for parts in (1, 3):
        model = copy.deepcopy(other)
        tuner = qt.attach(model, total_steps=2, finish_steps=2, finish_bits=(8, 6))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        x = torch.randn(1, 8, generator=torch.Generator().manual_seed(1))
        for _ in range(2):
            rounded.clear()
            for _ in range(parts):  # the same rows again: the mean of gradients is that of one part
                (tuner.combine(model(x).square().mean()) / parts).backward()
            optimizer.step()
            tuner.step()
            optimizer.zero_grad()
            assert sum(axis == 0 for *_, axis in rounded) == 2
        ended.append([p.detach().clone() for p in model.parameters()])
    for one, three in zip(*ended, strict=True):
        torch.testing.assert_close(one, three)


def test_a_weight_that_was_changed_in_between_is_rounded_anew():
    model = nn.Sequential(nn.Linear(8, 4))
    qt.attach(model, total_steps=2, finish_steps=2)
    x = torch.randn(3, 8)
    before = model(x)
    with torch.no_grad():
        model[0].weight.mul_(2)
    assert not torch.equal(model(x), before)
