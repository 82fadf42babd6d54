"""ERQ's two regressions and its choice of codes, against least squares and slow loops."""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import quanttune as qt
from quanttune import fake_quant
from quanttune.fake_quantizer import scale_of
from quanttune.quantization.methods import ERQ
from quanttune.quantization.methods.erq import compensate, round_columns
from quanttune.quantization.methods.rounding.flips import FLIPS, STEPS, choose_codes
from quanttune.quantization.methods.rounding.layers import Grid

FLOAT64 = {"rtol": 1e-9, "atol": 1e-12}
each_flip = pytest.mark.parametrize("flip", FLIPS)


def inputs(tokens: int = 60, columns: int = 8, bits: int = 4) -> tuple[Tensor, Tensor]:
    """Return correlated inputs and what rounding makes of them, float64."""
    x = torch.randn(tokens, columns) @ torch.randn(columns, columns)
    return x.double(), fake_quant(x, scale_of(x.abs().max(), bits), bits).double()


def grid_of(rows: Tensor, bits: int = 4) -> Grid:
    return Grid(scale_of(rows.abs().amax(1), bits), bits)


def test_two_columns_by_hand():
    x = torch.tensor([[1, 1], [2, 2.1], [-1, -0.9]], dtype=torch.float64)
    rows = torch.tensor([[0.7, 0.2]], dtype=torch.float64)  # 0.7 becomes 1: an error of .3
    grid = Grid(torch.ones(1), 4)
    rounded = round_columns(rows, grid, x.T @ x, 3, 1, 0.0, "published")
    change = rounded - rows
    assert change.tolist() == [pytest.approx([0.3, -0.294212], abs=1e-6)]
    assert (x[:, 0] * 0.3).square().sum().item() == pytest.approx(0.54)
    assert (x @ change.T).square().sum().item() == pytest.approx(0.001592, abs=1e-6)


# ------------------------------------------------------------------ errors of activations


def test_activation_error_is_that_of_least_squares_without_damping():
    x, rounded = inputs()
    rows = torch.randn(5, 8, dtype=torch.float64)
    expected, *_ = np.linalg.lstsq(rounded.numpy(), (x @ rows.T).numpy(), rcond=None)
    found = compensate(rows, rounded.T @ rounded, rounded.T @ x, 0.0)
    torch.testing.assert_close(found, torch.from_numpy(expected.T), **FLOAT64)


def test_activation_error_grows_with_damping_from_the_least_to_that_of_the_old_weights():
    x, rounded = inputs()
    rows = torch.randn(5, 8, dtype=torch.float64)
    before = (rounded @ rows.T - x @ rows.T).square().sum()
    errors = []
    for damping in (0.0, 0.1, 1.0, 10.0, 100.0, 1e4):
        found = compensate(rows, rounded.T @ rounded, rounded.T @ x, damping)
        errors.append((rounded @ found.T - x @ rows.T).square().sum())
    assert errors == sorted(errors)
    assert errors[0] < 0.9 * before
    assert errors[-1] < before
    far = compensate(rows, rounded.T @ rounded, rounded.T @ x, 1e12)
    torch.testing.assert_close(far, rows, rtol=1e-8, atol=1e-8)


def test_inputs_that_rounding_does_not_change_change_no_weight():
    x, _ = inputs()
    rows = torch.randn(5, 8, dtype=torch.float64)
    assert torch.equal(compensate(rows, x.T @ x, x.T @ x, 0.1), rows)


# ------------------------------------------------------------------ errors of weights


def slow_refinement(row: Tensor, step: float, bits: int, moments: Tensor, flip: str) -> Tensor:
    """Choose the codes of one row, with everything computed anew for each flip."""
    bounds = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    low, high = (row / step).floor().clamp(*bounds), (row / step).ceil().clamp(*bounds)
    code = (row / step).round().clamp(*bounds)
    for _ in range(STEPS):
        error = code * step - row
        other = torch.where(code == low, high, low)
        if flip == "greedy":
            trials = code.repeat(len(row), 1)
            trials[range(len(row)), range(len(row))] = other
            costs = [cost(trial * step - row, moments) for trial in trials]
            index = int(torch.stack(costs).argmin())
        else:
            gradient = 2 * moments @ error
            steepness = torch.where(error * gradient > 0, gradient.abs(), 0)
            index = int(steepness.argmax())
            target = error[index] - gradient[index]
            errors = [(c * step - row)[index] for c in (code, other)]
            if steepness[index] == 0 or abs(target - errors[0]) <= abs(target - errors[1]):
                break
        trial = code.clone()
        trial[index] = other[index]
        if cost(trial * step - row, moments) >= cost(error, moments):
            break
        code = trial
    return code * step


def cost(error: Tensor, moments: Tensor) -> Tensor:
    return error @ moments @ error


@each_flip
@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("size", [1, 0.1])
def test_codes_are_those_of_a_loop_over_rows_and_neighbours_that_cost_less(flip, bits, size):
    # with small inputs a step down the gradient often ends near where it begins
    x = size * inputs(200, 24)[1]
    rows, moments = torch.randn(40, 24, dtype=torch.float64), x.T @ x / 200
    rows[:, 3] = 0
    grid = grid_of(torch.cat([0.8 * rows[:5], rows[5:]]), bits)  # some values are clipped
    found = choose_codes(rows, grid, moments, flip)
    steps = grid.scale.double().tolist()
    expected = [
        slow_refinement(row, step, bits, moments, flip)
        for row, step in zip(rows, steps, strict=True)
    ]
    torch.testing.assert_close(found, torch.stack(expected), **FLOAT64)
    before = [cost(error, moments) for error in grid.nearest(rows) - rows]
    after = [cost(error, moments) for error in found - rows]
    assert all(a <= b for a, b in zip(after, before, strict=True))
    assert sum(after[5:]) < (0.8 if size == 1 or flip == "greedy" else 1) * sum(before[5:])


def test_columns_with_steps_of_their_own_are_columns_of_other_units():
    x, rows = inputs(200, 12)[1], torch.randn(6, 12, dtype=torch.float64)
    units = torch.tensor([1, 4, 0.5]).repeat_interleave(4).double()
    grid = grid_of(rows)
    expected = units * round_columns(rows, grid, x.T @ x, 200, 12, 0, "greedy")
    of_groups = Grid((grid.scale[:, None] * units).float(), 4)
    gram = (x / units).T @ (x / units)
    found = round_columns(rows * units, of_groups, gram, 200, 12, 0, "greedy")
    torch.testing.assert_close(found, expected, **FLOAT64)


@each_flip
def test_independent_inputs_are_rounded_to_nearest(flip):
    rows, moments = torch.randn(20, 8).double(), torch.rand(8).double().diag()
    grid = grid_of(rows)
    assert torch.equal(choose_codes(rows, grid, moments, flip), grid.nearest(rows))


def test_greedy_flips_come_nearest_to_the_best_codes():
    """Mean of the error over that of the best of all 2^8 codes, over 200 rows."""
    ratios = {"nearest": [], **{flip: [] for flip in FLIPS}}
    for _ in range(10):
        x = torch.randn(20, 8).double() @ torch.randn(8, 8).double()
        rows, moments = torch.randn(20, 8).double(), x.T @ x / 20
        grid = Grid(torch.ones(20), 8)
        ways = torch.tensor(list(itertools.product((0, 1), repeat=8))).double()
        choices = rows.floor()[:, None] + ways - rows[:, None]
        best = torch.einsum("rci,ij,rcj->rc", choices, moments, choices).amin(1)
        found = {flip: choose_codes(rows, grid, moments, flip) for flip in FLIPS}
        for name, values in {"nearest": grid.nearest(rows), **found}.items():
            error = values - rows
            ratios[name] += ((error @ moments * error).sum(1) / best).tolist()
    means = {name: np.mean(values) for name, values in ratios.items()}
    assert 1 <= means["greedy"] < 1.5 < means["published"] < means["nearest"]


@pytest.mark.parametrize("columns", [1, 2, 7, 8, 33])
@pytest.mark.parametrize("bias", [True, False])
def test_all_columns_but_the_bias_are_on_their_grid_and_later_ones_make_up(columns, bias):
    x = 0.2 * inputs(200, columns)[1]
    rows = torch.randn(700, columns + bias, dtype=torch.float64)
    a = torch.cat([x, torch.ones(200, 1).double()], 1) if bias else x
    grid = grid_of(rows[:, :columns])
    rounded = round_columns(rows, grid, a.T @ a, 200, columns, 0.1, "published")
    weight = rounded[:, :columns].float()
    assert torch.equal(fake_quant(weight, grid.scale, 4, 0), weight)
    nearest = torch.cat([grid.nearest(rows[:, :columns]), rows[:, columns:]], 1)
    error = (a @ (rounded - rows).T).square().sum()
    assert error <= (a @ (nearest - rows).T).square().sum() * (1 if bias or columns > 1 else 1.001)
    # by hand: halves of what is left, each passed on by a ridge regression
    expected, begin = rows.clone(), 0
    while begin < columns:
        end = begin + max((a.shape[1] - begin) // 2, 1)
        part = expected[:, begin:end].clone()
        expected[:, begin:end] = choose_codes(
            part, grid, (a.T @ a / 200)[begin:end, begin:end], "published"
        )
        moved = a[:, begin:end] @ (expected[:, begin:end] - part).T
        rest = a[:, end:]
        penalty = 0.1**0.5 * torch.eye(rest.shape[1]).double()
        wanted = torch.cat([-moved, torch.zeros(rest.shape[1], 700).double()])
        expected[:, end:] += torch.linalg.lstsq(torch.cat([rest, penalty]), wanted).solution.T
        begin = end
    torch.testing.assert_close(rounded, expected, rtol=1e-7, atol=1e-9)


# ------------------------------------------------------------------ whole models


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_is_given_float_inputs_and_its_grid_covers_the_new_weights(bias):
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3, bias=bias))
    first, second = (layer.weight.detach().double() for layer in model)
    offset = model[1].bias.detach().double() if bias else torch.zeros(3).double()
    x = torch.randn(50, 6) @ torch.randn(6, 6)
    middle = model[0](x).detach()
    rounded = fake_quant(middle, scale_of(middle.abs().max(), 4), 4).double()
    a = torch.cat([rounded, torch.ones(50, 1).double()], 1) if bias else rounded
    target = middle.double() @ second.T + offset
    old = torch.cat([second, offset[:, None]], 1) if bias else second
    # ridge about the old weights
    penalty = (50 * 0.01) ** 0.5 * torch.eye(a.shape[1]).double()
    wanted = torch.cat([target, penalty @ old.T])
    new = torch.linalg.lstsq(torch.cat([a, penalty]), wanted).solution.T
    method = ERQ(damping=0.01)
    qt.quantize(model, 4, weight_bits=16, coverage="linear", methods=[method], data=x.split(20))
    # 16 bits are near enough to float
    torch.testing.assert_close(model[1].weight.double(), new[:, :8], rtol=1e-3, atol=1e-4)
    if bias:
        torch.testing.assert_close(model[1].bias.double(), new[:, 8], rtol=1e-3, atol=1e-4)
    largest = new[:, :8].abs().amax(1)
    scale = model[1].weight_quantizer.scale.double()
    torch.testing.assert_close(scale, largest / (2**15 - 1), rtol=1e-6, atol=0)
    assert not torch.equal(first, model[0].weight.double())


@pytest.mark.parametrize("bits", [(4, 4), (4, 3), (6, 6)], ids=["W4A4", "W3A4", "W6A6"])
@pytest.mark.parametrize("bias", [True, False])
def test_outputs_are_nearer_than_those_of_gptq_and_these_than_nearest(bits, bias):
    x = torch.randn(400, 32) @ torch.randn(32, 32) / 32**0.5
    linear = nn.Linear(32, 24, bias=bias).requires_grad_(False)
    expected = linear(x)
    error = {}
    for method in ("erq", "gptq", None):
        model = nn.Sequential(nn.Linear(32, 24, bias=bias)).requires_grad_(False)
        model[0].load_state_dict(linear.state_dict())
        activations, weights = bits
        options = {"weight_bits": weights, "coverage": "linear", "data": [x]}
        qt.quantize(model, activations, methods=[method] if method else [], **options)
        error[method] = (model(x) - expected).square().mean().item()
    assert error["erq"] < error["gptq"] < error[None]


def test_an_unknown_flip_is_refused():
    with pytest.raises(ValueError, match="flip must be one of published, greedy, got 'random'"):
        ERQ(flip="random")
