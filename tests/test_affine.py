"""Grids with zero points, against their definition in numpy and the hand-quantized model."""

import copy
import math

import numpy as np
import pytest
import torch
from models import DEEP, MODELS
from torch import nn
from torch.nn import functional as F

import quanttune as qt
from quanttune import cpu, fake_quant, quantize, reference
from quanttune.analysis.errors import split_error
from quanttune.analysis.probes import watch
from quanttune.fake_quantizer import integer_range
from quanttune.quantization.affine_quantizer import AffineQuantizer
from quanttune.quantization.calibrators import AFFINE, AffineOMSE, MinMax, Range
from quanttune.quantization.calibrators.search import affine_qparams
from quanttune.quantization.learning.lsq import LearnedFakeQuant
from quanttune.quantization.requantization import requantize
from quanttune.quantization.saving.description import describe
from quanttune.quantization.simulation import quantizers
from quanttune.triton_kernels import fake_quantization as triton

BACKENDS = {"reference": reference, "C++": cpu, "Triton": triton}
TENSORS = {
    "two-sided": lambda: torch.randn(3000) * 2 + 1,
    "heavy tailed": lambda: torch.randn(3000) ** 5,
    "one-sided": lambda: torch.rand(3000).square() * 7,
    "one-sided below": lambda: -torch.rand(3000) * 0.03,
    "one-sided without zero": lambda: torch.rand(3000) * 5 + 5,
    "below without zero": lambda: -torch.rand(3000) - 8,
    "constant": lambda: torch.full((5,), 2.7),
    "constant below": lambda: torch.full((5,), -0.37),
    "zeros": lambda: torch.zeros(5),
    "huge": lambda: torch.tensor([-2e38, 1e38, 2.5e38]),
    "tiny": lambda: torch.tensor([-1e-39, 2e-39]),
}
each_tensor = pytest.mark.parametrize("kind", TENSORS)


def grid_of(low, high, bits):
    """The scale in float64, and the zero point: a range's affine grid, written out."""
    low, high = min(float(low), 0.0), max(float(high), 0.0)
    qmin, qmax = integer_range(bits)
    scale = max((high - low) / (qmax - qmin), np.finfo(np.float32).tiny) if high > low else 1.0
    return scale, int(np.clip(qmin - np.rint(low / scale), qmin, qmax))


def snapped(x, scale, zero_point, bits):
    """Round to a grid: the quotient is float32's, which decides on codes, the rest float64."""
    quotient = x.detach().float().numpy() / np.float32(scale)
    code = np.clip(np.rint(quotient) + zero_point, *integer_range(bits)).astype(np.float64)
    return torch.from_numpy((code - zero_point) * float(np.float32(scale)))


def frozen(x, bits=8, calibrator=None):
    """Return the quantizer of a site that saw x."""
    calibrator = calibrator or MinMax()
    quantizer = AffineQuantizer(bits, "input", calibrator, torch.device("cpu"))
    assert quantizer(x) is x
    quantizer.freeze("site")
    return quantizer


def two_layers():
    """A small model with one-sided tensors between its layers."""
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))


# ------------------------------------------------------------------ the function


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("bits", "zero_point"), [(3, -4), (3, 1), (8, -128), (8, 127), (16, -9)])
def test_codes_and_gradients_of_shifted_bounds(bits, zero_point, backend):
    """At a power of two torch multiplies by the exact reciprocal, so every bit is comparable."""
    qmin, qmax = integer_range(bits)
    scale, bounds = 2.0**-3, (qmin - zero_point, qmax - zero_point)
    halves = torch.arange(2 * bounds[0] - 5, 2 * bounds[1] + 6) / 2 * scale  # all ties
    x = torch.cat([halves[torch.randperm(len(halves))[:4000]], torch.randn(1001) * scale * qmax])
    grad = torch.randn_like(x)
    leaf = x.clone().requires_grad_()
    grid = scale, zero_point, qmin, qmax
    expected = torch.fake_quantize_per_tensor_affine(leaf, *grid)
    expected.backward(grad)
    kernel, step = BACKENDS[backend], torch.tensor(scale)
    assert torch.equal(kernel.fake_quant(x, step, *bounds, None), expected.detach())
    passed = kernel.fake_quant_backward(grad, x, step, *bounds, None)
    assert torch.equal(passed, leaf.grad)
    assert 0 < (passed == 0).float().mean() < 1


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_gradient_is_that_of_plain_autograd(bits):
    """Straight through where the code is inside; the rounding is a constant of the graph."""
    x, scale = torch.randn(500) * 3, torch.tensor(0.37)
    qmin, qmax = integer_range(bits)
    for zero_point in (qmin, 0, qmax):
        mine, plain = x.clone().requires_grad_(), x.clone().requires_grad_()
        code = (torch.round(plain.detach() / scale) - plain.detach() / scale) + plain / scale
        inside = (code >= qmin - zero_point - 1e-3) & (code <= qmax - zero_point + 1e-3)
        code = torch.where(inside, code, code.detach().clamp(qmin - zero_point, qmax - zero_point))
        expected, actual = code * scale, fake_quant(mine, scale, bits, zero_point=zero_point)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
        (actual * torch.cos(x)).sum().backward()
        (expected * torch.cos(x)).sum().backward()
        torch.testing.assert_close(mine.grad, plain.grad, rtol=1e-6, atol=0)
        assert torch.equal(mine.grad == 0, ~inside)


def test_without_a_zero_point_the_grid_is_symmetric():
    x, scale = torch.randn(100), torch.tensor(0.01)
    assert torch.equal(fake_quant(x, scale, 4, zero_point=0), fake_quant(x, scale, 4))
    narrow = fake_quant(-x.abs(), scale, 3, narrow=True, zero_point=-3)
    assert torch.equal(narrow, torch.zeros(100))


@pytest.mark.parametrize("wrong", [-9, 8, 1.5, torch.tensor(3)])
def test_what_is_no_code_is_refused(wrong):
    with pytest.raises(ValueError, match="zero_point must be a code from -8 to 7, got"):
        fake_quant(torch.ones(3), torch.tensor(1.0), 4, zero_point=wrong)


# ------------------------------------------------------------------ one site


@each_tensor
@pytest.mark.parametrize("bits", [2, 5, 8, 16])
def test_a_site_has_the_grid_of_its_range(kind, bits):
    x = TENSORS[kind]()
    quantizer = frozen(x, bits)
    scale, zero_point = grid_of(x.min(), x.max(), bits)
    assert quantizer.scale.item() == pytest.approx(scale, rel=1e-6)
    assert quantizer.zero == quantizer.zero_point == zero_point
    expected = snapped(x, quantizer.scale.item(), zero_point, bits)
    y = quantizer(x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.double(), expected, rtol=1e-7, atol=0)
    assert torch.equal(quantizer(torch.zeros(3)), torch.zeros(3))  # no matter where x lies
    assert torch.equal(quantizer(y), y)
    # whatever the zero point was rounded to; float32 rounds too, which 16 bits begin to see
    half = quantizer.scale.item() * 0.5 * (1 + 2.0 ** (bits - 22))
    assert (y.double() - x.double()).abs().max() <= half


def test_a_site_by_hand():
    """-1 to 3 at 3 bits: a step of 4/7, and -1 is 1.75 steps below zero, which round to 2."""
    quantizer = frozen(torch.tensor([-1.0, 0.3, 3.0]), 3)
    assert quantizer.zero == -4 + 2
    y = quantizer(torch.tensor([-9.0, -1.0, 0.3, 3.0, 9.0]))
    expected = torch.tensor([-2.0, -2.0, 1.0, 5.0, 5.0]) * 4 / 7
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=0)


def test_a_one_sided_tensor_gets_twice_the_levels():
    x = torch.rand(4000)
    symmetric = fake_quant(x, x.max() / 127) - x
    error = frozen(x)(x) - x
    ratio = (symmetric.square().mean() / error.square().mean()).item()
    assert ratio == pytest.approx((255 / 127) ** 2, rel=0.05)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", AFFINE)
def test_what_is_not_finite_is_refused(name, value):
    x = torch.randn(7, 6)
    x[3, 2] = value
    message = r"0\.input_quantizer held NaN or inf during calibration: (low|high)"
    with pytest.raises(ValueError, match=message):
        quantize(nn.Sequential(nn.Linear(6, 5)), symmetric=False, calibrator=name, data=[x])


# ------------------------------------------------------------------ calibrators


def ends(name, batches, bits):
    """The range of each calibrator, by its rule in docs/method.md, with zero in it."""
    values = [batch.double().numpy().ravel() for batch in batches]
    percent = {"percentile": 99.9, "percentile_ema": 99.999}.get(name, 100)
    pairs = np.array([np.percentile(x, [100 - percent, percent]) for x in values])
    if name in ("ema", "percentile_ema"):
        low, high = pairs[0]
        for next_low, next_high in pairs[1:]:
            low, high = low + 0.01 * (next_low - low), high + 0.01 * (next_high - high)
    elif name == "percentile":
        low, high = pairs.mean(0)
    else:
        low, high = pairs[:, 0].min(), pairs[:, 1].max()
    low, high = min(low, 0.0), max(high, 0.0)
    if name == "omse":
        x = batches[-1].double().numpy()
        losses = []
        for i in range(90):
            scale, zero = (high - low) * (1 - 0.01 * i) / (2**bits - 1), grid_of(low, high, bits)[1]
            losses.append(((snapped(batches[-1], scale, zero, bits).numpy() - x) ** 2).sum())
        factor = 1 - 0.01 * int(np.argmin(losses))
        low, high = low * factor, high * factor
    return low, high


@pytest.mark.parametrize("kind", ["two-sided", "heavy tailed", "one-sided", "below without zero"])
@pytest.mark.parametrize("name", AFFINE)
def test_a_model_has_the_ranges_of_its_calibrator(name, kind):
    batches = [TENSORS[kind]().view(-1, 6) * factor for factor in (1.0, 1.5)]
    options = {"calibrator": name, "symmetric": False}
    model = quantize(nn.Sequential(nn.Linear(6, 5)), 5, data=batches, **options)
    site = quantizers(model)["0.input_quantizer"]
    low, high = ends(name, batches, 5)
    np.testing.assert_allclose([site.low.item(), site.high.item()], [low, high], rtol=1e-5)
    scale, zero_point = grid_of(low, high, 5)
    assert site.scale.item() == pytest.approx(scale, rel=1e-5)
    assert site.zero == zero_point
    assert site.observer == name


def test_the_search_loses_no_more_than_minmax():
    x = TENSORS["heavy tailed"]()
    losses = [(frozen(x, 4, rule)(x) - x).square().sum() for rule in (AffineOMSE(4), MinMax())]
    assert losses[0] < losses[1]


def test_the_range_of_everything_that_float32_holds():
    top = torch.tensor(torch.finfo(torch.float32).max)
    scale, zero_point = affine_qparams(Range(-top, top), 8)
    assert scale.item() == pytest.approx(2 * top.item() / 255)
    assert zero_point == 0


# ------------------------------------------------------------------ whole models


def test_linear_is_quantized_like_by_hand():
    """Activations have zero points, the weight has none."""
    model, x = nn.Sequential(nn.Linear(6, 5)), torch.rand(7, 6) + 1
    weight = model[0].weight.detach()
    steps = weight.abs().amax(1, keepdim=True) / 7
    output = model(x).detach()
    expected = torch.round(weight / steps) * steps
    grid = grid_of(x.min(), x.max(), 4)
    assert grid[1] == -8
    expected = F.linear(snapped(x, *grid, 4).float(), expected, model[0].bias.detach())
    expected = snapped(expected, *grid_of(output.min(), output.max(), 4), 4).float()
    quantize(model, 4, symmetric=False, data=[x])
    torch.testing.assert_close(model(x).detach(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["vit", "bert"])
def test_every_site_of_a_model_rounds_to_its_own_grid(name):
    example = MODELS[name]()
    model = quantize(
        example.model.eval(), 6, coverage="full", symmetric=False, data=[example.inputs]
    )
    seen = {}
    watch(model, [example.inputs], lambda site, x, _: seen.update({f"{site}_quantizer": x}))
    sites = quantizers(model)
    assert seen.keys() == sites.keys()
    for site, x in seen.items():
        scale, zero_point = grid_of(x.min(), x.max(), 6)
        assert sites[site].scale.item() == pytest.approx(scale, rel=1e-6), site
        assert sites[site].zero == zero_point, site
        expected = snapped(x, sites[site].scale.item(), zero_point, 6)
        torch.testing.assert_close(sites[site](x).double(), expected, rtol=1e-6, atol=0)
    probabilities = [q.zero for q in sites.values() if q.kind == "probability"]
    assert probabilities == [-32]  # one-sided


@pytest.mark.parametrize("name", ["vit", "bert"])
def test_steps_are_no_wider_than_symmetric_ones(name):
    """A range is at most two magnitudes wide, and has one level more; of one side it is half."""
    example = MODELS[name]()
    options = {"coverage": "full", "data": [example.inputs]}
    symmetric = quantizers(quantize(copy.deepcopy(example.model.eval()), 4, **options))
    sites = quantizers(quantize(example.model, 4, symmetric=False, **options))
    for site, quantizer in sites.items():
        ratio = (quantizer.scale / symmetric[site].scale).item()
        assert ratio <= 14 / 15 * (1 + 1e-6), site
        assert quantizer.kind != "probability" or ratio == pytest.approx(7 / 15), site


@pytest.mark.parametrize("name", MODELS)
def test_sixteen_bits_are_nearly_float(name):
    example = MODELS[name]()
    expected = example.logits(example.model.eval())
    quantize(example.model, 16, coverage="full", symmetric=False, data=[example.inputs])
    assert 0 < (example.logits() - expected).norm() < 0.02 * expected.norm()


def test_other_bits_for_some_sites():
    example = DEEP["vit"]()
    overrides = {"*.0.*": {"bits": 3}, "*.1.mlp.fc2": None, "head.input_quantizer": None}
    model = quantize(
        example.model.eval(), symmetric=False, overrides=overrides, data=[example.inputs]
    )
    sites = quantizers(model)
    for name, site in sites.items():
        assert (site.bits == 3) == (".0." in name)
        assert -(2 ** (site.bits - 1)) <= site.zero < 2 ** (site.bits - 1)
    assert isinstance(model.blocks[1].mlp.fc2.input_quantizer, nn.Identity)
    assert "head.input_quantizer" not in sites
    assert model.blocks[0].mlp.fc2.weight_quantizer.bits == 3


def test_another_width_covers_the_same_range():
    example = MODELS["vit"]()
    float_model = copy.deepcopy(example.model.eval())
    model = quantize(example.model, 8, symmetric=False, data=[example.inputs])
    expected = example.logits()
    requantize(model, 4, "tensor")
    fresh = quantize(float_model, 4, weights="tensor", symmetric=False, data=[example.inputs])
    assert torch.equal(example.logits(model), example.logits(fresh))
    assert describe(model) == describe(fresh)
    requantize(model, 8, "channel")
    assert torch.equal(example.logits(model), expected)


def test_training_passes_gradients_where_nothing_is_clipped():
    model, x = nn.Sequential(nn.Linear(6, 5)), torch.rand(7, 6)
    quantize(model, 4, symmetric=False, coverage="linear", data=[x])
    leaf = torch.cat([x, x - 3, x + 3]).requires_grad_()
    model(leaf).sum().backward()
    weight = model[0].weight.detach()
    steps = weight.abs().amax(1, keepdim=True) / 7
    slope = (torch.round(weight / steps) * steps).sum(0)
    torch.testing.assert_close(leaf.grad[:7], slope.expand(7, 6), rtol=1e-5, atol=1e-7)
    assert torch.equal(leaf.grad[7:], torch.zeros(14, 6))


def test_a_state_dict_carries_the_zero_point():
    x = torch.randn(9, 6)
    first = quantize(two_layers(), symmetric=False, data=[x])
    other = quantize(two_layers(), symmetric=False, data=[x * 3 + 2])
    assert not torch.equal(first(x), other(x))
    other.load_state_dict(first.state_dict())
    assert torch.equal(first(x), other(x))
    assert torch.equal(copy.deepcopy(first)(x), first(x))


def test_the_summary_has_zero_points():
    x = torch.rand(7, 6)
    model = quantize(two_layers(), 8, symmetric=False, coverage="linear", data=[x])
    text = str(qt.summary(model)).splitlines()[: len(qt.summary(model).sites) + 2]
    assert text[1].split()[-2:] == ["absmax", "zero_point"]
    sites = {site.name: site for site in qt.summary(model).sites}
    assert sites["0.input_quantizer"].zero_point == -128
    assert sites["0.input_quantizer"].absmax == pytest.approx(x.max().item())
    assert sites["0.weight_quantizer"].zero_point is None
    assert [line.split()[-1] for line in text[2:]] == ["-", "-128", "-", "-128"]
    assert "zero_point=-128" in repr(model[0].input_quantizer)
    symmetric = quantize(two_layers(), data=[x])
    assert "zero_point" not in str(qt.summary(symmetric))
    assert {site.zero_point for site in qt.summary(symmetric).sites} == {None}
    below = frozen(torch.tensor([-3.0, 1.0]))
    model[0].input_quantizer = below
    site = next(s for s in qt.summary(model).sites if s.name == "0.input_quantizer")
    assert site.absmax == pytest.approx(3, abs=below.scale.item())


# ------------------------------------------------------------------ the split of errors


@pytest.mark.parametrize("kind", sorted({*TENSORS} - {"huge", "tiny"}))
@pytest.mark.parametrize("factor", [0.4, 1.0, 2.0])
def test_saturation_ends_where_the_grid_does(kind, factor):
    """What lies beyond the grid's own ends saturates; of others, float32 holds no squares."""
    x = TENSORS[kind]()
    quantizer = frozen(x * factor, 4)
    scale, zero = quantizer.scale.item(), quantizer.zero
    low, high = (-8 - zero) * scale, (7 - zero) * scale
    saturation = precision = 0.0
    for value in x.double().tolist():
        clipped = min(max(value, low), high)
        code = min(max(round(float(np.float32(value) / np.float32(scale))), -8 - zero), 7 - zero)
        saturation += (value - clipped) ** 2
        precision += (clipped - code * scale) ** 2
    split = split_error(x, quantizer.forward)
    size = 1e-9 * float(x.double().square().sum())  # rounding of float32
    assert split.saturation == pytest.approx(saturation, rel=1e-4, abs=size)
    assert split.precision == pytest.approx(precision, rel=1e-4, abs=size)
    error = (x.double() - quantizer(x).double()).square().sum().item()
    assert split.total == pytest.approx(error, rel=1e-4, abs=size)


# ------------------------------------------------------------------ learned scales


@pytest.mark.parametrize("zero_point", [-8, -3, 7])
def test_a_learned_scale_has_the_slope_of_float64(zero_point):
    x, scale = (torch.randn(400) * 2).requires_grad_(), torch.tensor(0.3, requires_grad=True)
    upstream = torch.randn(400)
    y = LearnedFakeQuant.apply(x, scale, -8 - zero_point, 7 - zero_point, None)
    y.backward(upstream)
    wide, step = x.detach().double().requires_grad_(), scale.detach().double().requires_grad_()
    low, high = -8 - zero_point, 7 - zero_point
    steps = wide / step
    codes = (steps.round() - steps).detach() + steps
    inside = (codes >= low - 1e-6) & (codes <= high + 1e-6)
    expected = torch.where(inside, codes, codes.detach().clamp(low, high)) * step
    expected.backward(upstream.double())
    torch.testing.assert_close(y.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=1e-6, atol=0)
    levels = {-8: 15, -3: 10, 7: 14}[zero_point]
    slope = step.grad / math.sqrt(400 * levels)
    torch.testing.assert_close(scale.grad.double(), slope, rtol=1e-5, atol=0)


def losses_of(example, count):
    """Take steps, and return the losses before each."""
    optimizer = torch.optim.AdamW(example.model.parameters(), lr=3e-3, weight_decay=0)
    losses = []
    for _ in range(count):
        optimizer.zero_grad()
        loss = example.task_loss()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_learned_scales_keep_their_zero_points(tmp_path):
    example = MODELS["vit"]()
    losses_of(example, 20)
    model = quantize(example.model.eval(), 5, symmetric=False, data=[example.inputs])
    zeros = {name: site.zero for name, site in quantizers(model).items()}
    before = example.logits()
    scales = qt.learn_scales(model)
    assert torch.equal(example.logits(), before)
    losses = losses_of(example, 15)
    assert losses[-1] < 0.9 * losses[0]
    assert sum(not torch.equal(scale, torch.ones_like(scale)) for scale in scales) > len(scales) / 2
    expected = example.logits()
    qt.save(model, tmp_path / "model.safetensors")
    loaded = qt.load(MODELS["vit"]().model.eval(), tmp_path / "model.safetensors")
    assert torch.equal(example.logits(loaded), expected)
    for quantized in (model, loaded):
        qt.freeze_scales(quantized)
        assert torch.equal(example.logits(quantized), expected)
        for name, site in quantizers(quantized).items():
            assert site.zero == zeros[name]
            assert site.low.item() == pytest.approx(site.scale.item() * (-16 - site.zero))
            assert site.high.item() == pytest.approx(site.scale.item() * (15 - site.zero))
        requantize(quantized, 5, "channel")  # the ends give the same grid again
        for name, site in quantizers(quantized).items():
            assert site.zero == zeros[name]


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize("name", ["mse", "kl", "dynamic"])
def test_calibrators_without_an_affine_form_are_refused(name):
    message = (
        f"calibrator '{name}' has no affine form: with symmetric=False it must be one of minmax, "
        "ema, percentile, percentile_ema, omse, or a function"
    )
    with pytest.raises(ValueError, match=message):
        quantize(two_layers(), symmetric=False, calibrator=name, data=[torch.randn(3, 6)])


class Magnitude:
    """A calibrator of one's own, for symmetric grids."""

    def update(self, x):
        pass

    def absmax(self):
        return torch.tensor(3.0)


class Both(Magnitude):
    def range(self):
        return Range(torch.tensor(1.0), torch.tensor(3.0))


def test_a_calibrator_of_ones_own_knows_both_ends():
    model, x = two_layers(), torch.randn(3, 6)
    before = model(x)
    with pytest.raises(TypeError, match=r"needs a calibrator that has range\(\).*, got Magnitude"):
        quantize(model, symmetric=False, calibrator=Magnitude, data=[x])
    assert torch.equal(model(x), before)
    assert type(model[0]) is nn.Linear
    quantize(model, symmetric=False, calibrator=Both, data=[x])
    site = quantizers(model)["0.input_quantizer"]
    assert (site.low, site.high, site.zero) == (0, 3, -128)  # zero is on the grid


def test_a_searched_range_serves_one_width():
    model = quantize(two_layers(), symmetric=False, calibrator="omse", data=[torch.randn(3, 6)])
    with pytest.raises(ValueError, match="omse searched its ranges for 8 bits"):
        requantize(model, 6, "channel")
