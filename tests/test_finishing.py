"""The last steps of a tuning: what rounds and to what, what stays as it was, and resuming."""

import copy

import pytest
import torch
from models import MODELS, shallow
from torch import nn

import quanttune as qt

STEPS, FINISH, BITS = 5, 3, (8, 4)


def chain():
    return nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 4))


def attached(model, **options):
    finish = {"finish_steps": FINISH, "finish_bits": BITS, **options}
    return qt.attach(model, 0.01, total_steps=STEPS, **finish)


def rounded(x, bits, over=(0, 1, 2)):
    """Round to the grid of the largest magnitude; its code is constant, its step is not."""
    step = x.abs().amax(over, keepdim=True) / (2 ** (bits - 1) - 1)
    return x + (torch.round(x / step) - x / step).detach() * step


def by_hand(model, x, bits):
    """Return what a chain gives when all is rounded that `quantize` rounds."""
    first, norm, act, last = model
    for linear in (first, last):
        weight = rounded(linear.weight, bits, 1)
        x = rounded(rounded(x, bits) @ weight.T + linear.bias, bits)
        if linear is first:
            x = act(rounded(norm(rounded(x, bits)), bits))
    return x


def train(model, tuner, optimizer, batches, begin=0):
    model.train()
    for x in batches[begin:]:
        loss = tuner.combine((model(x) - 1).square().mean())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        tuner.step()


def test_each_step_rounds_to_its_width_and_evaluation_does_not():
    model, x = chain(), torch.randn(3, 6, 8)
    keys, exact = list(model.state_dict()), copy.deepcopy(model).double()
    tuner = attached(model)
    for step in range(STEPS):
        tuner.resume(step)
        y = model.train()(x)
        if step < STEPS - FINISH:
            expected = exact(x.double())
        else:
            expected = by_hand(exact, x.double(), BITS[step % 2])
            assert tuner.alpha == 0
            assert tuner.combine(loss := y.square().mean()) is loss
        torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model.eval()(x), exact(x.double()).float())
        assert list(model.state_dict()) == keys


def test_gradients_of_a_rounded_step_are_those_of_its_grids_too():
    model, x = chain(), torch.randn(3, 6, 8)
    exact = copy.deepcopy(model).double()
    attached(model).resume(STEPS - 1)
    model.train()(x).square().sum().backward()
    by_hand(exact, x.double(), BITS[(STEPS - 1) % 2]).square().sum().backward()
    for actual, expected in zip(model.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(actual.grad.double(), expected.grad, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", [*MODELS, "deit"])
def test_a_model_is_what_it_was_afterwards(name):
    example = shallow(name)
    model = example.model.train()
    before = copy.deepcopy(model)
    parameters, classes = list(map(id, model.parameters())), list(map(type, model.modules()))
    tuner = attached(model)
    for step in range(STEPS):
        tuner.resume(step)
        loss = tuner.combine(example.task_loss())
        loss.backward()
        assert model.state_dict().keys() == before.state_dict().keys()
    assert not torch.equal(example.logits(), example.logits(before))
    tuner.detach()
    assert torch.equal(example.logits(), example.logits(before))
    assert list(map(id, model.parameters())) == parameters
    assert list(map(type, model.modules())) == classes
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("stopped", [1, 3, 4])
def test_a_training_that_was_stopped_ends_with_the_same_bits(stopped):
    batches = [torch.randn(3, 6, 8) for _ in range(STEPS)]
    whole = chain()
    part = copy.deepcopy(whole)
    ended = []
    for model, last in ((whole, STEPS), (part, stopped)):
        tuner, optimizer = attached(model), torch.optim.AdamW(model.parameters(), lr=1e-2)
        train(model, tuner, optimizer, batches[:last])
        ended.append(copy.deepcopy((model.state_dict(), optimizer.state_dict())))
        tuner.detach()
    again = chain()
    again.load_state_dict(ended[1][0])
    optimizer = torch.optim.AdamW(again.parameters(), lr=1e-2)
    optimizer.load_state_dict(ended[1][1])
    tuner = attached(again)
    tuner.resume(stopped)
    train(again, tuner, optimizer, batches, stopped)
    tuner.detach()
    for name, value in again.state_dict().items():
        assert torch.equal(value, ended[0][0][name]), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"finish_steps": STEPS + 1}, f"from 0 to total_steps, {STEPS}, got {STEPS + 1}"),
        ({"finish_steps": -1}, "got -1"),
        ({"finish_bits": ()}, "must hold a width"),
        ({"finish_bits": (8, 1)}, "bits must be from 2 to 16, got 1"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        attached(chain(), **options)


def test_what_cannot_be_rounded_is_refused_before_the_first_step():
    model = chain()
    model[3].forward = lambda x: x
    with pytest.raises(ValueError, match="3 has a forward of its own"):
        attached(model)
    assert [type(module) for module in model] == [nn.Linear, nn.LayerNorm, nn.GELU, nn.Linear]


def test_there_is_no_way_back():
    tuner = attached(chain())
    tuner.resume(STEPS - FINISH)
    with pytest.raises(ValueError, match="rounds since step 2, and cannot go back to step 1"):
        tuner.resume(1)


def test_a_compiled_model_is_refused_at_its_first_step():
    model = chain().train()
    tuner = attached(model)
    tuner.combine(model(torch.randn(3, 6, 8)).square().mean())
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(ValueError, match=r"finish_steps and torch\.compile do not go together"):
        tuner.combine(compiled(torch.randn(3, 6, 8)).square().mean())
