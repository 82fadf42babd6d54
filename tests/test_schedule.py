"""The weight of the outlier loss over the optimizer steps."""

import pytest
import torch
from torch import nn

import quanttune as qt
from quanttune.tuning.schedule import alpha_at


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        ("linear", [0.8, 0.6, 0.4, 0.2, 0.0, 0.0]),
        # 0.8 * (1 + cos(pi * done)) / 2, where cos(pi / 4) = 1 / sqrt(2)
        ("cosine", [0.8, 0.6828427, 0.4, 0.1171573, 0.0, 0.0]),
        ("constant", [0.8] * 6),
    ],
)
def test_decay_over_four_steps_and_beyond(decay, expected):
    steps = [0, 1, 2, 3, 4, 1000]
    assert [alpha_at(step, 0.8, decay, 4) for step in steps] == pytest.approx(expected)


@pytest.mark.parametrize("decay", ["linear", "cosine"])
@pytest.mark.parametrize("total_steps", [1, 3, 7, 1000])
def test_decay_starts_at_alpha_and_ends_at_exactly_zero(decay, total_steps):
    assert alpha_at(0, 0.3, decay, total_steps) == 0.3
    assert alpha_at(total_steps, 0.3, decay, total_steps) == 0.0
    assert alpha_at(total_steps + 1, 0.3, decay, total_steps) == 0.0
    alphas = [alpha_at(step, 0.3, decay, total_steps) for step in range(total_steps + 1)]
    assert alphas == sorted(alphas, reverse=True)
    assert alphas[-2] > 0


def test_constant_needs_no_number_of_steps():
    assert alpha_at(10**6, 0.7, "constant", None) == 0.7


@pytest.mark.parametrize(
    ("decay", "expected"),
    [("linear", [0.5, 0.25, 0.0, 0.0]), ("cosine", [0.5, 0.25, 0.0, 0.0]), ("constant", [0.5] * 4)],
)
def test_tuner_advances_with_step_and_never_below_zero(decay, expected):
    tuner = qt.attach(_model(), 0.5, decay, total_steps=2)
    alphas = []
    for _ in expected:
        alphas.append(tuner.alpha)
        tuner.step()
    assert alphas == pytest.approx(expected)
    assert tuner.steps == 4


def test_combine_weighs_both_losses_by_the_alpha_of_the_step():
    model, x = _model(), torch.randn(4, 8)
    tuner = qt.attach(model, 0.8, "linear", total_steps=4)
    for alpha in (0.8, 0.6, 0.4, 0.2):
        # an outlier-free task of the same size as the ratios keeps the gradient warning quiet
        task = 10 * model(x).square().sum()
        total = tuner.combine(task)
        expected = (1 - alpha) * task + alpha * tuner.outlier_loss
        torch.testing.assert_close(total, expected)
        torch.testing.assert_close(tuner.task_loss, task.detach())
        tuner.step()
    task = model(x).square().sum()
    assert tuner.combine(task) is task


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": -0.1}, r"alpha must be from 0 to 1, got -0\.1"),
        ({"alpha": 1.5}, r"alpha must be from 0 to 1, got 1\.5"),
        ({"alpha": float("nan")}, r"alpha must be from 0 to 1, got nan"),
        ({"decay": "step"}, r"decay must be one of linear, cosine, constant, got 'step'"),
        ({"decay": "linear"}, r"decay='linear' needs total_steps, a positive number, got None"),
        ({"decay": "cosine", "total_steps": 0}, r"decay='cosine' needs total_steps.* got 0"),
        ({"decay": "linear", "total_steps": -5}, r"decay='linear' needs total_steps.* got -5"),
        (
            {"decay": "constant", "balance": "equal"},
            r"balance must be one of none, initial, got 'e",
        ),
    ],
)
def test_settings_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        qt.attach(_model(), **arguments)


def _model() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 3))
