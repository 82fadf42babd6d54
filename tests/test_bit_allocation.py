"""Widths of weights under a budget: costs by numpy, the choice beside all that there are."""

import copy
from itertools import product

import numpy as np
import pytest
import torch
from models import MODELS, bert, vit
from oracle import quiet
from torch import nn

import quanttune as qt
from quanttune.quantization.bit_allocation import cheapest, error, nuclear_norm
from quanttune.quantization.methods.rounding.layers import layers_of
from quanttune.quantization.methods.rounding.moments import Moments
from quanttune.quantization.state import weight_quantizers

pytestmark = quiet
CHOICES = (4, 5, 6, 7, 8)


def uneven(bias=True):
    """Return two layers of unlike inputs: the second one's weight has an outlier."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8, bias=bias), nn.ReLU(), nn.Linear(8, 5, bias=bias))
    with torch.no_grad():
        model[2].weight[:, 0] *= 20
    return model, torch.randn(3, 7, 6)


def cost_by_numpy(layer, x, bits):
    weight, high = layer.weight.detach().double().numpy(), 2 ** (bits - 1) - 1
    steps = np.abs(weight).max(1, keepdims=True) / high
    errors = weight - steps * np.clip(np.rint(weight / steps), -high - 1, high)
    rows = x.detach().double().numpy().reshape(-1, x.shape[-1])
    bias = 0 if layer.bias is None else layer.bias.detach().double().numpy()
    norm = np.linalg.svd(rows @ weight.T + bias, compute_uv=False).sum()
    return norm * np.square(rows @ errors.T).sum()


@pytest.mark.parametrize("bias", [True, False])
def test_costs_are_those_of_numpy(bias):
    model, x = uneven(bias)
    expected = [cost_by_numpy(model[0], x, bits) for bits in CHOICES]
    rounded = qt.quantize(copy.deepcopy(model), coverage="weight_only", calibrator="dynamic")
    (layer, _), moments = layers_of(rounded), Moments(6, torch.device("cpu"))
    moments.add(x, x)
    norm = nuclear_norm(layer, moments.gram)
    found = [norm * error(layer, bits, moments.of_inputs) for bits in CHOICES]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("bits", [4.0, 4.7, 5.5, 8.0])
def test_it_is_the_cheapest_of_all_within_the_budget(bits, bias):
    model, x = uneven(bias)
    layers, given = (model[0], model[2]), (x, model[:2](x))
    sizes = [layer.weight.numel() for layer in layers]
    costs = {
        widths: sum(map(cost_by_numpy, layers, given, widths))
        for widths in product(CHOICES, repeat=2)
        if np.dot(widths, sizes) <= bits * sum(sizes)
    }
    found = qt.allocate_bits(model, bits, data=list(x.split(2)))
    expected = min(costs, key=costs.get)
    assert found == {
        f"{name}.weight_quantizer": {"bits": width}
        for name, width in zip((0, 2), expected, strict=True)
    }
    if bits not in CHOICES:
        assert len(set(expected)) == 2


def test_the_choice_is_that_of_trying_all():
    draw = np.random.default_rng(0)
    for _ in range(40):
        layers = int(draw.integers(1, 6))
        choices = (2, 4, 7)
        sizes = draw.integers(1, 30, layers).tolist()
        costs = draw.random((layers, 3)).tolist()
        budget = int(draw.integers(2 * sum(sizes), 8 * sum(sizes)))
        totals = [
            sum(cost[way] for cost, way in zip(costs, ways, strict=True))
            for ways in product(range(3), repeat=layers)
            if sum(choices[w] * size for w, size in zip(ways, sizes, strict=True)) <= budget
        ]
        found = cheapest(costs, sizes, choices, budget)
        assert np.dot(found, sizes) <= budget
        total = sum(cost[choices.index(w)] for cost, w in zip(costs, found, strict=True))
        assert total == pytest.approx(min(totals), rel=1e-12)


def test_large_layers_keep_within_the_budget():
    """Sizes that share no factor are rounded up to units of the budget."""
    sizes = [2_359_297, 589_831, 7_077_913]
    costs = [[4.0, 2.0, 1.0], [8.0, 4.0, 2.0], [1.0, 0.5, 0.25]]
    found = cheapest(costs, sizes, (4, 5, 6), 5 * sum(sizes))
    assert np.dot(found, sizes) <= 5 * sum(sizes)
    assert found == [6, 6, 4]


@pytest.mark.parametrize("name", ["vit", "bert", "opt", "swin"])
def test_models_are_quantized_so_saved_and_loaded(name, tmp_path):
    torch.manual_seed(0)
    example = MODELS[name]()
    model, data = example.model.eval(), [example.inputs]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    overrides = qt.allocate_bits(model, 5, data=data)
    assert all(torch.equal(tensor, before[n]) for n, tensor in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())
    qt.quantize(model, 8, weight_bits=4, overrides=overrides, data=data)
    held = {n: (m.weight.numel(), q.bits) for n, (m, q) in weight_quantizers(model).items()}
    widths = [held[site] for site in overrides]
    assert {bits for _, bits in widths} - {4}
    assert {site: {"bits": held[site][1]} for site in overrides} == overrides
    assert sum(size * bits for size, bits in widths) <= 5 * sum(size for size, _ in widths)
    qt.save(model, tmp_path / "m")
    torch.manual_seed(0)
    again = qt.load(MODELS[name]().model.eval(), tmp_path / "m")
    assert torch.equal(example.logits(again), example.logits(model))


def test_padding_does_not_count():
    torch.manual_seed(0)
    example = bert(2)
    words = example.inputs[:1]
    padded = torch.cat([words, torch.ones_like(words)], 1)
    mask = torch.cat([torch.ones_like(words), torch.zeros_like(words)], 1)
    model = example.model.eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, 0, parameter.shape[-1] ** -0.5)
    batch = {"input_ids": padded, "attention_mask": mask}
    budgets = [4.5, 5, 5.5, 6, 6.5]

    def widths(batch, **options):
        return [qt.allocate_bits(model, bits, data=[batch], **options) for bits in budgets]

    alone = widths({"input_ids": words})
    assert widths(batch) == alone
    assert widths(batch, mask=None) != alone


def test_what_is_refused():
    model, data = vit().model.eval(), [vit().inputs]
    with pytest.raises(ValueError, match=r"from 4, the least of choices, to 16, got 3\.5"):
        qt.allocate_bits(model, 3.5, data=data)
    with pytest.raises(ValueError, match=r"choices must be whole numbers from 2 to 16, got \(1,\)"):
        qt.allocate_bits(model, 4, choices=(1,), data=data)
    with pytest.raises(ValueError, match="got generator"):
        qt.allocate_bits(model, 4, data=(x for x in data))
    with pytest.raises(ValueError, match="was reached by data"):
        qt.allocate_bits(model, 4, data=[])
    with pytest.raises(ValueError, match="is quantized already"):
        qt.allocate_bits(qt.quantize(model, data=data), 4, data=data)
