"""GPTQ against optimal brain quantization, whose inverse is computed anew for every column."""

import copy

import pytest
import torch
from torch import Tensor, nn

import quanttune as qt
from quanttune import fake_quant
from quanttune.fake_quantizer import scale_of
from quanttune.quantization.methods import GPTQ
from quanttune.quantization.methods import gptq as module
from quanttune.quantization.methods.rounding.layers import Grid
from quanttune.quantization.methods.rounding.linear_systems import damped_factor

FLOAT64 = {"rtol": 1e-9, "atol": 1e-12}


def case(rows: int = 5, columns: int = 12, bits: int = 4) -> tuple[Tensor, Grid, Tensor]:
    """Return weights, their grid, and the second moments of correlated inputs."""
    weight = torch.randn(rows, columns, dtype=torch.float64)
    inputs = torch.randn(40, columns).double() @ torch.randn(columns, columns).double()
    return weight, grid_of(weight, bits), 2 / 40 * inputs.T @ inputs


def grid_of(weight: Tensor, bits: int) -> Grid:
    return Grid(scale_of(weight.abs().amax(1), bits), bits)


def nearest(weight: Tensor, grid: Grid) -> Tensor:
    return fake_quant(weight.float(), grid.scale, grid.bits, 0)


def brain_quantization(weight: Tensor, grid: Grid, hessian: Tensor, damping: float = 0.01):
    """Round column by column, and spread each error by the inverse of what is left of hessian."""
    weight = weight.clone()
    hessian = hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian))
    for column in range(weight.shape[1]):
        inverse = hessian[column:, column:].inverse()
        step = (grid.scale if grid.scale.dim() == 1 else grid.scale[:, column]).double()
        code = (weight[:, column] / step).round()
        rounded = code.clamp(-(2 ** (grid.bits - 1)), 2 ** (grid.bits - 1) - 1) * step
        error = (weight[:, column] - rounded) / inverse[0, 0]
        weight[:, column:] -= error[:, None] * inverse[0]
        weight[:, column] = rounded
    return weight


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("block", [1, 5, 128])
def test_equals_optimal_brain_quantization_whatever_the_block(block, bits, monkeypatch):
    weight, grid, hessian = case(bits=bits)
    before = weight.clone()
    monkeypatch.setattr(module, "BLOCK", block)
    expected = brain_quantization(weight, grid, hessian)
    torch.testing.assert_close(GPTQ().round(weight, grid, hessian), expected, **FLOAT64)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("block", [5, 128])
def test_each_column_is_on_the_grid_of_its_group(block, act_order, monkeypatch):
    weight, _, hessian = case()
    by_group = weight.unflatten(1, (3, 4)).abs().amax(2).repeat_interleave(4, 1)
    grid, order = Grid(scale_of(by_group, 4), 4), torch.arange(12)
    if act_order:
        order = hessian.diagonal().argsort(descending=True)
    monkeypatch.setattr(module, "BLOCK", block)
    turned, expected = Grid(grid.scale[:, order], 4), torch.empty_like(weight)
    expected[:, order] = brain_quantization(weight[:, order], turned, hessian[order][:, order])
    found = GPTQ(act_order=act_order).round(weight, grid, hessian)
    torch.testing.assert_close(found, expected, **FLOAT64)


def test_columns_of_much_energy_come_first_with_act_order():
    weight, grid, hessian = case()
    order = sorted(range(12), key=lambda column: -hessian[column, column].item())
    expected = torch.empty_like(weight)
    expected[:, order] = brain_quantization(weight[:, order], grid, hessian[order][:, order])
    rounded = GPTQ(act_order=True).round(weight, grid, hessian)
    torch.testing.assert_close(rounded, expected, **FLOAT64)
    assert not torch.equal(rounded, GPTQ().round(weight, grid, hessian))


def test_independent_inputs_are_rounded_to_nearest():
    weight, grid, _ = case()
    rounded = GPTQ().round(weight, grid, torch.eye(12, dtype=torch.float64))
    assert torch.equal(rounded.float(), nearest(weight, grid))


def test_columns_that_nothing_reaches_are_rounded_to_nearest_and_change_no_other():
    weight, grid, hessian = case()
    alive = torch.arange(12) % 4 != 1
    dead = hessian * alive * alive[:, None]
    rounded = GPTQ().round(weight, grid, dead)
    assert torch.equal(rounded[:, ~alive].float(), nearest(weight, grid)[:, ~alive])
    mean = dead.diagonal().sum() + 3  # a dead diagonal is 1
    damping = 0.01 * (mean / 12) / dead.diagonal()[alive].mean()
    kept = brain_quantization(weight[:, alive], grid, hessian[alive][:, alive], damping)
    torch.testing.assert_close(rounded[:, alive], kept, **FLOAT64)


def test_damping_is_raised_where_it_does_not_do():
    hessian = torch.diag(torch.tensor([1.0, -0.5], dtype=torch.float64))
    expected = torch.diag(torch.tensor([2.0, 0.5], dtype=torch.float64)).sqrt()
    torch.testing.assert_close(damped_factor(hessian, 0.01), expected, **FLOAT64)
    with pytest.raises(ValueError, match=r"no Cholesky factor with a damping of 0\.1: are the"):
        damped_factor(hessian, 1e-4)
    with pytest.raises(ValueError, match="inputs finite"):
        damped_factor(hessian * torch.nan, 0.01)


@pytest.mark.parametrize("weights", ["channel", "tensor"])
def test_a_layer_is_given_what_rounded_layers_before_it_make(weights):
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 24, bias=False))
    x = torch.randn(50, 6) @ torch.randn(6, 6)
    expected, calibrated = copy.deepcopy(model), x
    activations = x
    for layer, after in ((expected[0], expected[1]), (expected[2], nn.Identity())):
        # the grids of activations are those of the float model
        rounded = fake_quant(activations, scale_of(calibrated.abs().max(), 4), 4)
        calibrated = after(layer(calibrated)).detach()
        weight = layer.weight.detach().double()
        grid = grid_of(weight, 8)  # so fine that codes tell what the inputs were
        if weights == "tensor":
            grid = Grid(grid.scale.max().expand(len(weight)), 8)
        hessian = 2 / 50 * rounded.double().T @ rounded.double()
        layer.weight.data = brain_quantization(weight, grid, hessian).float()
        activations = after(nn.functional.linear(rounded, layer.weight, layer.bias)).detach()
    options = {"weight_bits": 8, "weights": weights, "coverage": "linear"}
    qt.quantize(model, 4, methods=["gptq"], data=x.split(20), **options)
    torch.testing.assert_close(model[0].weight, expected[0].weight, rtol=1e-6, atol=0)
    torch.testing.assert_close(model[2].weight, expected[2].weight, rtol=1e-6, atol=0)
    assert torch.equal(model[0].bias, expected[0].bias)
    torch.testing.assert_close(model(x), activations, rtol=1e-5, atol=1e-6)
