"""Refit: the change of a layer against numpy, its limits, and what it leaves as it was."""

import copy

import numpy as np
import pytest
import torch
from models import MODELS, bert, shallow
from torch import nn

import quanttune as qt
from quanttune.refitting.clamping import STEP, narrowest
from quanttune.refitting.route import route_of

WIDTH, SAMPLES, RIDGE = 6, 40, 1e-3


class Block(nn.Module):
    """Two Linear modules whose outputs go into sums, and one that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.head = nn.Linear(WIDTH, 3)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        x = x + self.dropout(self.first(x))
        x = self.second(x.tanh()) + x
        return nn.functional.linear(x.relu(), bias=self.head.bias, weight=self.head.weight)


@pytest.fixture
def data():
    return [10 * torch.randn(SAMPLES // 4, 5, WIDTH) for _ in range(4)]


def solved(module, x, wanted):
    """Return weight and bias by least squares: the ridge is rows of their own."""
    x, wanted = (t.detach().double().flatten(0, -2).numpy() for t in (x, wanted))
    weight = module.weight.detach().double().numpy()
    bias = np.zeros(len(weight)) if module.bias is None else module.bias.detach().double().numpy()
    ones = [] if module.bias is None else [np.ones((len(x), 1))]
    inputs = np.concatenate([x, *ones], 1)
    damping = RIDGE * np.mean(np.diag(inputs.T @ inputs))
    rows = np.concatenate([inputs, np.sqrt(damping) * np.eye(inputs.shape[1])])
    lacks = np.concatenate([wanted - x @ weight.T - bias, np.zeros((inputs.shape[1], len(weight)))])
    change = np.linalg.lstsq(rows, lacks, rcond=None)[0]
    return weight + change[:WIDTH].T, bias + (change[WIDTH] if ones else 0)


def refitted(module, x, wanted):
    """Return a copy of a Linear, solved by numpy."""
    weight, bias = solved(module, x, wanted)
    module = copy.deepcopy(module)
    module.weight.data = torch.from_numpy(weight)
    if module.bias is not None:
        module.bias.data = torch.from_numpy(bias)
    return module


@torch.no_grad()
def test_layers_are_solved_one_after_the_other_as_by_numpy(data):
    model, limit = Block().eval(), 8.0
    original = copy.deepcopy(model).double()
    assert qt.refit(model, data, clamp=limit, ridge=RIDGE) is model
    x = torch.cat(data).double()
    one = x + original.first(x)
    two = original.second(one.tanh()) + one
    first = refitted(original.first, x, one.clamp(-limit, limit) - x)
    new_one = x + first(x)
    second = refitted(original.second, new_one.tanh(), two.clamp(-limit, limit) - new_one)
    new_two = second(new_one.tanh()) + new_one
    head = refitted(original.head, new_two.relu(), original.head(two.relu()))
    assert one.abs().max() > 2 * limit  # it has something to do
    for name, expected in {"first": first, "second": second, "head": head}.items():
        actual = dict(model.get_submodule(name).named_parameters())
        for key, value in expected.named_parameters():
            torch.testing.assert_close(actual[key].double(), value, rtol=1e-4, atol=1e-5)
        difference = actual["weight"] - original.get_submodule(name).weight
        assert difference.norm() > 1e-2 * actual["weight"].norm()


def batches_of(example):
    return list(example.inputs.split(2))


@pytest.mark.parametrize("name", [*MODELS, "deit"])
def test_without_a_limit_the_answers_stay(name):
    example = shallow(name)
    before = copy.deepcopy(example.model).eval()
    qt.refit(example.model, batches_of(example), clamp=torch.inf)
    after = copy.deepcopy(example.model).eval()
    with torch.no_grad():
        expected, actual = example.logits(before), example.logits(after)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_outliers_are_gone_and_the_layers_behind_make_up_for_it(data):
    model, limit = Block().eval(), 30.0
    model.first.bias[2] += 200
    x = torch.cat(data)
    expected = model(x)
    one = (x + model.first(x)).clamp(-limit, limit)
    two = (model.second(one.tanh()) + one).clamp(-limit, limit)
    clamped = model.head(two.relu())
    qt.refit(model, data, clamp=limit)
    assert (x + model.first(x)).abs().max() < 2 * limit
    assert (model(x) - expected).norm() < 0.2 * (clamped - expected).norm()


@torch.no_grad()
def test_a_range_is_measured_as_small_as_the_answers_allow(data):
    model = Block().eval()
    route = route_of(model, data[0], None)
    assert route.names == ("first", "second", "head")
    assert route.scales.keys() == {"first", "second"}
    sums = data[0] + model.first(data[0])
    assert route.reach >= (sums.abs().max() / sums.square().mean().sqrt()).item() * (1 - 1e-5)
    assert route.scales["first"] == pytest.approx(sums.square().mean().sqrt().item(), rel=1e-5)

    def moved(multiple):
        one, two = (multiple * route.scales[name] for name in ("first", "second"))
        x = sums.clamp(-one, one)
        x = (model.second(x.tanh()) + x).clamp(-two, two)
        expected = model(data[0])
        return ((model.head(x.relu()) - expected).norm() / expected.norm()).item()

    found = narrowest(model, data[0], None, route, 0.05)
    assert moved(found) <= 0.05 < moved(found / STEP)


def test_padding_takes_no_part():
    example = bert()
    ids = example.inputs
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    padded = {"input_ids": ids, "attention_mask": mask}
    alone = [{"input_ids": ids[:1, :4]}, {"input_ids": ids[1:]}]
    one, other = (copy.deepcopy(example.model).eval() for _ in range(2))
    qt.refit(one, [padded], clamp=1.0)
    qt.refit(other, alone, clamp=1.0)
    start = example.model.state_dict()
    for name, value in one.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[name], rtol=1e-3, atol=1e-5)
    assert any(not torch.equal(value, start[name]) for name, value in one.state_dict().items())


class Odd(nn.Module):
    """A weight with two holders, and a module that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.tied, self.other, self.twice, self.own = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.other.weight = self.tied.weight

    def forward(self, x):
        x = self.other(self.tied(x).tanh()).tanh()
        return x + self.own(self.twice(self.twice(x)))


def test_what_is_shared_or_called_twice_stays(data):
    model = Odd().train()
    before = copy.deepcopy(model.state_dict())
    qt.refit(model, data, clamp=0.1)
    changed = {n for n, value in model.state_dict().items() if not torch.equal(value, before[n])}
    assert changed == {"own.weight", "own.bias"}
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


class Fork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.left(x) if x.mean() < 50 else self.right(x)


def test_what_cannot_be_refitted_is_refused(data):
    with pytest.raises(ValueError, match="data is empty"):
        qt.refit(Block(), [])
    with pytest.raises(ValueError, match="is quantized already"):
        qt.refit(qt.quantize(Block().eval(), data=data), data)
    with pytest.raises(ValueError, match="no sum is one of nothing: there are first, second"):
        qt.refit(Block(), data, clamp={"nothing": 3.0})
    with pytest.raises(ValueError, match="comes to the end where the first one comes to left"):
        qt.refit(Fork(), [data[0], data[0] + 100])


def test_patterns_choose_the_sums_that_are_clamped(data):
    model = Block().eval()
    one, other = copy.deepcopy(model), copy.deepcopy(model)
    qt.refit(one, data, clamp={"*": 8.0})
    qt.refit(other, data, clamp=8.0)
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])
    qt.refit(model, data, clamp={"second": 8.0})
    assert not torch.equal(model.first.weight, one.first.weight)
    assert not torch.equal(model.second.weight, one.second.weight)


def test_an_interrupt_leaves_the_model_as_it_was(data):
    model = Block().eval()
    before = copy.deepcopy(model.state_dict())

    def stop(what, done, total):
        if done == 2:
            assert not torch.equal(model.first.weight, before["first.weight"])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        qt.refit(model, data, clamp=8.0, progress=stop)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
