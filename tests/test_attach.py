"""What attach and detach leave behind, and what a copy of an attached model is."""

import copy
import io
import pickle

import pytest
import torch
from models import MODELS, Example
from oracle import (
    assert_near,
    assert_same_bits,
    constant,
    each_model,
    expected_step,
    gradients,
    quiet,
)
from torch import nn

import quanttune as qt
from quanttune.tuning.hooks import is_attached

HOOKS = [k for k, v in vars(nn.Module()).items() if "hook" in k and isinstance(v, dict)]

# -------------------------------------------------------------------------------- attach and detach


def fingerprint(model: nn.Module) -> list:
    """Return what attaching might change: every module's attributes, hooks and their options."""
    return [
        (name, list(vars(module)), [list(vars(module)[hook].items()) for hook in HOOKS])
        for name, module in model.named_modules()
    ]


@quiet
@each_model
def test_detach_restores_the_model(name):
    example = MODELS[name]()
    model = example.model
    model.register_forward_hook(lambda *_: None, always_call=True)  # the user's own hook stays
    before, state = fingerprint(model), copy.deepcopy(model.state_dict())
    logits, plain = example.logits(), gradients(model, example.task_loss())
    for _ in range(50):
        tuner = constant(model)
        assert is_attached(model)
        tuner.detach()
        assert not is_attached(model)
    tuner = constant(model)
    assert fingerprint(model) != before
    assert_same_bits(model.state_dict(), state)
    gradients(model, tuner.combine(example.task_loss()))
    assert torch.equal(example.logits(), logits)
    tuner.detach()
    model.zero_grad()
    assert len(before) == len(list(model.modules()))
    assert fingerprint(model) == before
    assert_same_bits(model.state_dict(), state)
    assert torch.equal(example.logits(), logits)
    assert_same_bits(gradients(model, example.task_loss()), plain)


def test_attaching_twice_is_refused():
    model = MODELS["vit"]().model
    tuner = constant(model)
    before = fingerprint(model)
    for part in (model, model.blocks):
        message = f"{type(part).__name__} is attached already: detach\\(\\) its tuner first"
        with pytest.raises(ValueError, match=message):
            constant(part)
    assert fingerprint(model) == before
    tuner.detach()
    constant(model).detach()


def test_a_model_without_a_site_is_refused_and_left_alone():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    before = fingerprint(model)
    with pytest.raises(ValueError, match="no Linear, Conv1D or LayerNorm of Sequential matches"):
        constant(model)
    with pytest.raises(ValueError, match=r"include=\['head.\*'\] and exclude=\['0'\]"):
        constant(nn.Sequential(nn.Linear(2, 2)), include=["head.*"], exclude=["0"])
    assert fingerprint(model) == before


def test_detached_tuner_observes_nothing():
    example = MODELS["vit"]()
    tuner = constant(example.model)
    loss = example.task_loss()
    tuner.detach()
    with pytest.raises(RuntimeError, match="no activation was observed since the last combine"):
        tuner.combine(loss)


# ---------------------------------------------------------------------------------------- alpha = 0


def train(example: Example, steps: int, tuner: qt.Tuner | None, optimizer=None) -> None:
    optimizer = optimizer or torch.optim.AdamW(example.model.parameters(), lr=0.01)
    for _ in range(steps):
        loss = example.task_loss()
        if tuner:
            loss = tuner.combine(loss)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if tuner:
            tuner.step()


@pytest.mark.parametrize("name", ["vit", "bert"])
@pytest.mark.parametrize("decay", ["linear", "constant"])
def test_alpha_zero_trains_bit_for_bit_as_without_a_tuner(name, decay):
    example = MODELS[name]()
    plain = copy.deepcopy(example)
    train(plain, 5, None)
    train(example, 5, qt.attach(example.model, 0.0, decay, total_steps=9))
    assert_same_bits(example.model.state_dict(), plain.model.state_dict())


@quiet
@pytest.mark.parametrize("decay", ["linear", "cosine"])
def test_from_total_steps_on_training_is_plain(decay):
    example = MODELS["bert"]()
    start = example.model.classifier.weight.detach().clone()
    tuner = qt.attach(example.model, 0.5, decay, total_steps=2)
    optimizer = torch.optim.SGD(example.model.parameters(), lr=0.01)
    train(example, 2, tuner, optimizer)
    plain = copy.deepcopy(example)
    assert not torch.equal(plain.model.classifier.weight, start)
    assert tuner.alpha == 0
    loss = example.task_loss()
    assert tuner._observers.take() == []  # it costs nothing any more
    assert tuner.combine(loss) is loss
    train(example, 3, tuner, optimizer)
    train(plain, 3, None, torch.optim.SGD(plain.model.parameters(), lr=0.01))
    assert_same_bits(example.model.state_dict(), plain.model.state_dict())


# ------------------------------------------------------------------------------------------- copies


def through_torch_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@quiet
@each_model
@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), through_torch_save],
    ids=["deepcopy", "pickle", "save"],
)
def test_a_copy_is_not_attached(name, duplicate):
    example = MODELS[name]()
    plain = gradients(example.model, example.task_loss())
    loss, expected = expected_step(example, 0.3)
    example.model.zero_grad()
    tuner = constant(example.model)
    twin = duplicate(example.model)
    assert is_attached(example.model)
    assert not is_attached(twin)
    assert_same_bits(twin.state_dict(), example.model.state_dict())
    assert torch.equal(example.logits(twin), example.logits(example.model))
    tuner.combine(example.task_loss())
    assert_same_bits(gradients(twin, example.task_loss(twin)), plain)
    with pytest.raises(RuntimeError, match="no activation was observed"):
        tuner.combine(example.task_loss(twin))
    # both train on, each with its own tuner
    for model in (twin, example.model):
        own = tuner if model is example.model else constant(model)
        total = own.combine(example.task_loss(model))
        torch.testing.assert_close(total.double(), loss, rtol=1e-6, atol=0)
        assert_near(gradients(model, total), expected)


@quiet
def test_a_step_that_was_given_up_is_forgotten():
    example = MODELS["vit"]()
    tuner = constant(example.model)
    expected = gradients(example.model, tuner.combine(example.task_loss()))
    twice = [example.task_loss(), example.task_loss()]
    both = gradients(example.model, tuner.combine(twice[1]))
    assert any(not torch.equal(both[name], expected[name]) for name in expected)
    example.task_loss()
    tuner.forget()
    assert_same_bits(gradients(example.model, tuner.combine(example.task_loss())), expected)
