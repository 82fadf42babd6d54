"""Learned rounding beside all ways to round, and OAC beside GPTQ."""

import copy
import itertools

import pytest
import torch
from torch import nn

import quanttune as qt
from quanttune.fake_quantizer import scale_of
from quanttune.quantization.methods import GPTQ, AdaRound
from quanttune.quantization.methods.adaround import learned_rounding
from quanttune.quantization.methods.rounding.layers import Grid


def cost(errors, moments):
    return ((errors @ moments) * errors).sum(-1)


def case(rows, columns):
    weight = torch.randn(rows, columns).double()
    x = torch.randn(8 * columns, columns).double() @ torch.randn(columns, columns).double()
    return weight, Grid(scale_of(weight.abs().amax(1), 3), 3), x.T @ x / (8 * columns)


def test_no_way_to_round_is_better_than_the_best_and_nearest_is_not_better():
    rows, grid, moments = case(30, 8)
    ways = torch.tensor(list(itertools.product((0, 1), repeat=8))).double()
    trials = grid.step[:, None] * ((rows / grid.step).floor()[:, None] + ways).clamp(-4, 3)
    best = cost(trials - rows[:, None], moments).amin(1)
    found = learned_rounding(rows, grid, moments, 500)
    assert ((found / grid.step - (found / grid.step).round()).abs() < 1e-9).all()
    assert ((found - rows).abs() <= grid.step * 1.0001).all()
    ours, nearest = (cost(values - rows, moments) for values in (found, grid.nearest(rows)))
    assert (ours >= best * 0.9999).all()
    assert (ours <= nearest).all()
    assert ours.sum() < 0.75 * nearest.sum()


@pytest.mark.parametrize("size", [1, 1e-3])
def test_of_many_columns_less_than_half_of_the_error_is_left(size):
    rows, grid, moments = case(16, 64)
    rows, grid = size * rows, Grid(size * grid.scale, 3)
    ours, nearest, gptq = (
        cost(values - rows, moments).sum()
        for values in (
            learned_rounding(rows, grid, moments, 500),
            grid.nearest(rows),
            GPTQ().round(rows, grid, moments),
        )
    )
    assert ours < 0.5 * nearest
    assert ours < 1.15 * gptq


def test_independent_inputs_are_rounded_to_nearest():
    rows, moments = torch.randn(20, 8).double(), torch.rand(8).double().diag()
    grid = Grid(scale_of(rows.abs().amax(1), 4), 4)
    assert torch.equal(learned_rounding(rows, grid, moments, 200), grid.nearest(rows))


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 5)).eval()


def test_groups_and_models():
    x = torch.randn(200, 16) @ torch.randn(16, 16)
    options = {"coverage": "weight_only", "weight_bits": 3, "weights": 8, "data": [x]}
    plain, learned = (qt.quantize(small(), methods=m, **options) for m in ([], ["adaround"]))
    weight = learned[0].weight
    assert torch.equal(learned[0].weight_quantizer(weight), weight)
    off = [(model(x) - small()(x)).norm() for model in (learned, plain)]
    assert off[0] < 0.8 * off[1]


def test_oac_is_gptq_for_the_answer():
    x = torch.randn(64, 16)
    options = {"weight_bits": 3, "coverage": "linear", "data": x.split(16)}
    found, wanted = (
        qt.quantize(copy.deepcopy(small()), methods=[method], **options)
        for method in ("oac", GPTQ(hessian="fisher"))
    )
    assert torch.equal(found[0].weight, wanted[0].weight)
    assert found.quantization_state.scheme.methods == ("oac",)


def test_options_are_checked():
    with pytest.raises(ValueError, match="iterations must be a whole number from 1, got 0"):
        AdaRound(iterations=0)
