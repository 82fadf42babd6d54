"""AWQ's factors and the clipping of weights, against searches in float64."""

import copy

import pytest
import torch
from equalized import Block
from torch import Tensor, nn

import quanttune as qt
from quanttune.quantization.methods import AWQ
from quanttune.quantization.methods.rounding.layers import Grid
from quanttune.quantization.methods.weight_clipping import clipped
from quanttune.quantization.running import Data
from quanttune.quantization.scheme import Scheme

BITS, SIZE = 3, 2
TOP = 2 ** (BITS - 1) - 1


def on_grid(rows: Tensor, scale: Tensor) -> Tensor:
    return (rows / scale).round().clamp(-TOP - 1, TOP) * scale


def rounded(weight: Tensor, size: int) -> Tensor:
    """Round (outputs, inputs) in groups."""
    rows = weight.unflatten(1, (-1, size))
    return on_grid(rows, rows.abs().amax(2, keepdim=True) / TOP).flatten(1)


@pytest.mark.parametrize("size", [SIZE, 4])
def test_awq_takes_the_exponent_that_rounded_weights_cost_least_under(size):
    torch.manual_seed(1)
    block = Block().requires_grad_(False)
    x = torch.randn(300, 4) * torch.tensor([0.2, 1, 40, 2])
    seen = []
    block.one.register_forward_pre_hook(lambda _, args: seen.append(args[0].double()))
    weights = [m.weight.double().clone() for m in (block.one, block.other)]
    before = block.norm.weight.clone()
    exact = block(x)
    scheme = Scheme(8, BITS, coverage="weight_only", weights=size)
    AWQ().apply(block, scheme, Data([x]))
    torch.testing.assert_close(block(x), exact, rtol=1e-5, atol=1e-5)
    rows = seen[0]
    energy, trials = rows.abs().mean(0), []
    for i in range(20):
        scale = energy ** (i / 20)
        scale = scale / (scale.max() * scale.min()).sqrt()
        error = sum(
            ((rows / scale) @ rounded(w * scale, size).T - rows @ w.T).square().sum()
            for w in weights
        )
        trials.append((float(error), scale))
    best = min(trials, key=lambda trial: trial[0])
    assert best[0] < 0.9 * trials[0][0]
    torch.testing.assert_close((before / block.norm.weight).double(), best[1], rtol=1e-4, atol=0)


def brute_force(row: Tensor, x: Tensor) -> float:
    """Return the part of a row's range that loses least on tokens, and more where equal."""
    wanted = x @ row
    errors = {}
    for step in range(10):
        ratio = 1 - step / 20
        scale = row.abs().max() * ratio / TOP
        errors[ratio] = float((x @ on_grid(row, scale) - wanted).square().sum())
    return min(errors, key=errors.get)


def case():
    x = torch.randn(50, 8).double() @ torch.randn(8, 8).double()
    return torch.randn(20, 8).double(), x


def test_each_group_is_clipped_where_its_own_error_is_least():
    rows, x = case()
    spread = (rows.unflatten(1, (2, 4)).abs().amax(2) / TOP).float()
    grid = Grid(spread.repeat_interleave(4, 1), BITS)
    found = clipped(rows, grid, x.T @ x, 4).scale / grid.scale
    expected = [[brute_force(row[i : i + 4], x[:, i : i + 4]) for i in (0, 4)] for row in rows]
    torch.testing.assert_close(found[:, ::4], torch.tensor(expected))
    assert len(found.unique()) > 2


def test_rows_and_whole_weights_are_clipped_as_one():
    rows, x = case()
    grid = Grid((rows.abs().amax(1) / TOP).float(), BITS)
    found = clipped(rows, grid, x.T @ x, 8).scale / grid.scale
    torch.testing.assert_close(found, torch.tensor([brute_force(row, x) for row in rows]))
    whole = Grid((rows.abs().max() / TOP).float(), BITS)
    ratio = float(clipped(rows, whole, x.T @ x, 8).scale / whole.scale)
    errors = {
        part: float((x @ (on_grid(rows, whole.scale.double() * part) - rows).T).square().sum())
        for part in (1 - i / 20 for i in range(10))
    }
    assert ratio == pytest.approx(min(errors, key=errors.get))


def test_a_clipped_model_loses_less_than_one_rounded_to_nearest():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 5)).eval()
    x = torch.randn(200, 16)
    options = {"coverage": "weight_only", "weight_bits": BITS, "weights": 8, "data": [x]}
    plain = qt.quantize(copy.deepcopy(model), **options)
    better = qt.quantize(copy.deepcopy(model), methods=["weight_clipping"], **options)
    off = [(one(x) - model(x)).norm() for one in (better, plain)]
    assert off[0] < 0.9 * off[1]
