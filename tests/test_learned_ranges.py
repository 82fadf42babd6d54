"""LSQ+, PACT and DoReFa beside LSQ: gradients against float64, training, files."""

import copy
import math

import pytest
import torch
from models import MODELS, gpt2, shallow
from oracle import assert_same_bits
from torch import nn

import quanttune as qt
from quanttune.fake_quantizer import fake_quant, grid_of
from quanttune.quantization.learned_ranges import LEARNERS
from quanttune.quantization.learning.dorefa import squashed, top_of
from quanttune.quantization.learning.lsq_plus import (
    LearnedOffsetFakeQuant,
    three_sigma_scale,
    zero_of,
)
from quanttune.quantization.learning.pact import ClippedFakeQuant
from quanttune.quantization.requantization import requantize
from quanttune.quantization.rounded_linear import rounded_linear
from quanttune.quantization.saving.description import describe
from quanttune.quantization.state import quantizers, weight_quantizers

HOWS = list(LEARNERS)
each_how = pytest.mark.parametrize("how", HOWS)


def options_of(how):
    """Return how a model is quantized that learns so."""
    return {"symmetric": False, "calibrator": "omse"} if how == "lsq+" else {}


def learning(how, name="vit", **options):
    """Return an example whose model learns its ranges, a copy before that, and the parameters."""
    torch.manual_seed(0)
    example = gpt2() if name == "gpt2" else MODELS[name]()
    options = {"bits": 6, **options_of(how), **options}
    qt.quantize(example.model.eval(), data=[example.inputs], **options)
    before = copy.deepcopy(example.model)
    return example, before, qt.learn_scales(example.model, how)


# ------------------------------------------------------------------ LSQ+


def lsq_plus(x, scale, offset, bits):
    """LSQ+ in float64 by autograd: x = clamp(round((x - offset) / scale)) * scale + offset."""
    qmin, qmax = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    norm = math.sqrt(x.numel() * qmax)
    scale, offset = (p / norm + (p - p / norm).detach() for p in (scale, offset))
    steps = (x - offset) / scale
    inside = (steps.round() >= qmin) & (steps.round() <= qmax)
    codes = (steps.round() - steps).detach() + steps
    return torch.where(inside, codes, codes.detach().clamp(qmin, qmax)) * scale + offset


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("zero", [-1, 0, 1])
def test_lsq_plus_has_the_gradients_of_float64(zero, bits, dtype):
    torch.manual_seed(0)
    x = torch.randn(6, 7, 5).to(dtype).requires_grad_()
    scale = (torch.rand(()) + 0.5).div(2 ** (bits - 2)).requires_grad_()
    offset = (-zero * scale.detach()).requires_grad_()  # a whole number of steps, as it is used
    upstream = torch.randn(6, 7, 5).to(dtype)
    reference = [p.detach().double().requires_grad_() for p in (x, scale, offset)]
    expected = lsq_plus(*reference, bits)
    expected.backward(upstream.double())
    ends = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    y = LearnedOffsetFakeQuant.apply(x, scale, offset, *ends)
    y.backward(upstream)
    tolerance = 1e-6 if dtype is torch.float32 else 2**-8
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=1e-6)
    assert torch.equal(x.grad.double(), reference[0].grad)
    assert 0 < (x.grad == 0).float().mean() < 1
    for one, other in zip((scale, offset), reference[1:], strict=True):
        torch.testing.assert_close(one.grad.double(), other.grad, rtol=1e-4, atol=1e-6)


def test_lsq_plus_by_hand():
    """2 bits, steps of 1, code 0 at 1.2, so 1: the grid is -1, 0, 1, 2."""
    x = torch.tensor([0.7, 5.0, -9.0])
    norm = math.sqrt(3 * 1)
    for i, (value, dx, ds, do) in enumerate([(1, 1, 0.3, 0), (2, 0, 1, 1), (-1, 0, -2, 1)]):
        leaf = x.clone().requires_grad_()
        scale, offset = (torch.tensor(v, requires_grad=True) for v in (1.0, 1.2))
        y = LearnedOffsetFakeQuant.apply(leaf, scale, offset, -2, 1)
        y[i].backward()
        assert (y[i].item(), leaf.grad[i].item()) == (value, dx)
        assert scale.grad.item() * norm == pytest.approx(ds, abs=1e-6)
        assert offset.grad.item() * norm == pytest.approx(do)


def test_an_offset_is_rounded_to_codes_that_exist():
    zeros = [zero_of(torch.tensor(0.5), torch.tensor(at), -8, 7).item() for at in (0.2, 1.6, -9, 9)]
    assert zeros == [0, -3, 7, -8]


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_weights_of_lsq_plus_begin_at_three_deviations(axis):
    torch.manual_seed(0)
    weight = torch.randn(6, 9) * 0.3 + 0.2
    found = three_sigma_scale(weight, 4, axis)
    others = tuple(d for d in (0, 1) if d != axis)
    mean = weight.double().mean(others)
    sigma = weight.double().std(others, correction=0)
    expected = torch.maximum((mean - 3 * sigma).abs(), (mean + 3 * sigma).abs()) / 8
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    assert torch.equal(three_sigma_scale(torch.zeros(2, 3), 4, 0), torch.ones(2))


def test_offsets_learn_where_scales_alone_cannot():
    """A hundredth of the values is what the grid reaches down to: only an offset leaves it out."""
    torch.manual_seed(0)
    x = torch.rand(500, 8)
    x[:5] = -2.0
    left = {}
    for how in ("lsq", "lsq+"):
        model = nn.Sequential(nn.Linear(8, 8))
        qt.quantize(model, 2, data=[x], symmetric=False, coverage="linear_inputs", weight_bits=8)
        grid = model[0].input_quantizer
        optimizer = torch.optim.Adam(qt.learn_scales(model, how), lr=1e-2)
        for _ in range(300):
            optimizer.zero_grad()
            (grid(x) - x).abs().mean().backward()
            optimizer.step()
        left[how] = (grid(x) - x).abs().mean().item()
        qt.freeze_scales(model)
        assert (grid(x) - x).abs().mean().item() == pytest.approx(left[how], rel=1e-5)
    assert left["lsq+"] < 0.7 * left["lsq"]


# ------------------------------------------------------------------ PACT


def pact(x, scale, bits, zero=0):
    """PACT in float64 by autograd: clip at learned ends, round straight through."""
    qmin, qmax = -(2 ** (bits - 1)) - zero, 2 ** (bits - 1) - 1 - zero
    clipped = torch.where(
        x >= qmax * scale, qmax * scale, torch.where(x < qmin * scale, qmin * scale, x)
    )
    return clipped + ((clipped / scale).round() * scale - clipped).detach()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("bits", "zero"), [(2, 0), (4, 0), (4, -8), (8, 20)])
def test_pact_has_the_gradients_of_float64(bits, zero, dtype):
    torch.manual_seed(0)
    x = torch.randn(6, 7, 5).to(dtype).requires_grad_()
    scale = torch.tensor(0.7 / 2 ** (bits - 2)).requires_grad_()
    upstream = torch.randn(6, 7, 5).to(dtype)
    reference = [p.detach().double().requires_grad_() for p in (x, scale)]
    expected = pact(*reference, bits, zero)
    expected.backward(upstream.double())
    grid = grid_of(x, scale, bits, None, zero_point=zero)
    y = ClippedFakeQuant.apply(x, scale, *grid)
    y.backward(upstream)
    assert torch.equal(y, fake_quant(x, scale, bits, zero_point=zero))
    assert torch.equal(x.grad.double(), reference[0].grad)
    assert 0 < (x.grad == 0).float().mean() < 1
    torch.testing.assert_close(scale.grad.double(), reference[1].grad, rtol=1e-4, atol=1e-5)


def test_a_clipping_value_has_the_slope_of_the_paper():
    """From 0 to alpha = 3 in 2 bits: only what is clipped at alpha moves it, by 1."""
    alpha = torch.tensor(3.0, requires_grad=True)
    x = torch.tensor([-1.0, 0.4, 2.9, 3.0, 7.0])
    grid = grid_of(x, alpha.detach() / 3, 2, None, zero_point=-2)
    for i, slope in enumerate([0, 0, 0, 1, 1]):
        alpha.grad = None
        ClippedFakeQuant.apply(x, alpha / 3, *grid)[i].backward()
        assert alpha.grad.item() == slope


def test_pact_in_a_linear_layer_keeps_the_gradients():
    torch.manual_seed(0)
    x, weight = torch.randn(3, 4, 6), torch.randn(5, 6)
    scale = torch.tensor(0.2)
    gradients = []
    for way in ("apart", "together"):
        leaves = [t.clone().requires_grad_() for t in (x, scale, weight)]
        grid = grid_of(x, scale, 3, None)
        if way == "apart":
            y = nn.functional.linear(ClippedFakeQuant.apply(leaves[0], leaves[1], *grid), leaves[2])
        else:
            y = rounded_linear(leaves[0], leaves[2], None, (ClippedFakeQuant, (leaves[1], *grid)))
        y.square().sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------ DoReFa


def test_a_squashed_weight_by_hand():
    """tanh(0.5) / tanh(2) of the largest, 2."""
    weight = torch.tensor([[2.0, -0.5], [0.0, 1.0]], requires_grad=True)
    y = squashed(weight, top_of(weight))
    expected = 2 * torch.tensor([[2.0, -0.5], [0.0, 1.0]]).double().tanh() / math.tanh(2)
    torch.testing.assert_close(y.double(), expected)
    y[0, 1].backward()
    assert weight.grad[0, 1].item() == pytest.approx(2 * (1 - math.tanh(0.5) ** 2) / math.tanh(2))
    slope = -2 * math.tanh(-0.5) / math.tanh(2) ** 2 * (1 - math.tanh(2) ** 2)
    assert weight.grad[0, 0].item() == pytest.approx(slope)  # the largest stretches the others
    assert weight.grad[1].tolist() == [0, 0]
    assert torch.equal(squashed(torch.zeros(3), torch.tensor(0.0)), torch.zeros(3))


def test_the_gradient_of_a_rounded_weight_is_that_of_its_tanh():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 5)), torch.randn(7, 6)
    qt.quantize(model, 3, coverage="weight_only", data=[x])
    assert qt.learn_scales(model, "dorefa") == []
    layer = model[0]
    weight = layer.weight.detach().double().requires_grad_()
    curved = weight.tanh()
    stretched = curved / curved.abs().max() * weight.detach().abs().max()
    step = stretched.abs().amax(1, keepdim=True) / 3
    rounded = stretched + ((stretched / step).round() * step - stretched).detach()
    expected = x.double() @ rounded.T + layer.bias.double()
    torch.testing.assert_close(model(x).double(), expected, rtol=1e-5, atol=1e-6)
    expected.square().sum().backward()
    model(x).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad.double(), weight.grad, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------ models


@each_how
@pytest.mark.parametrize("name", [*MODELS, "gpt2"])
def test_frozen_is_what_was_learned(name, how):
    example, before, parameters = learning(how, name, weights="tensor")
    start = (example.logits() - example.logits(before)).abs().max().item()
    assert start == 0 if how == "lsq" else start < 0.2
    optimizer = torch.optim.AdamW(example.model.parameters(), lr=1e-2)
    assert all(any(p is q for q in example.model.parameters()) for p in parameters)
    for _ in range(3):
        optimizer.zero_grad()
        example.task_loss(example.model.train()).backward()
        optimizer.step()
    learned = example.logits(example.model.eval())
    assert not torch.equal(learned, example.logits(before))
    rows = {site.name: site for site in qt.summary(example.model).sites}
    qt.freeze_scales(example.model)
    assert torch.equal(example.logits(), learned)
    assert {site.name: site for site in qt.summary(example.model).sites} == rows
    assert describe(example.model).keys() == describe(before).keys()
    assert example.model.state_dict().keys() >= before.state_dict().keys()
    assert not any("quantizer" in n for n, _ in example.model.named_parameters())


@each_how
def test_what_each_learns(how):
    _, before, parameters = learning(how, "bert")
    sites = len(quantizers(before))
    weights = sum(not isinstance(o, nn.Embedding) for o, _ in weight_quantizers(before).values())
    assert len(parameters) == {
        "lsq": sites + weights, "lsq+": 2 * sites + weights, "pact": sites, "dorefa": 0,
    }[how]  # fmt: skip


@each_how
def test_it_pays_to_learn(how):
    """A fresh model at 4 bits: training lowers the loss, with the ranges as parameters."""
    example, _, parameters = learning(how, bits=4)
    groups = [
        {"params": [p for p in example.model.parameters() if not any(p is q for q in parameters)]},
        {"params": parameters, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = example.task_loss(example.model.train())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


@each_how
@pytest.mark.parametrize("name", ["vit", "bert"])
def test_a_model_that_is_learning_is_saved_and_copied(name, how, tmp_path):
    example, _, parameters = learning(how, name)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.05)
    qt.save(example.model, tmp_path / "model.safetensors")
    torch.manual_seed(5)
    again = qt.load(MODELS[name]().model.eval(), tmp_path / "model.safetensors")
    for other in (again, copy.deepcopy(example.model)):
        assert torch.equal(example.logits(other), example.logits())
    assert_same_bits(again.state_dict(), example.model.state_dict())
    assert describe(again) == describe(example.model)
    for model in (again, example.model):
        qt.freeze_scales(model)
    assert torch.equal(example.logits(again), example.logits())
    qt.save(example.model, tmp_path / "frozen.safetensors")
    frozen = qt.load(MODELS[name]().model.eval(), tmp_path / "frozen.safetensors")
    assert torch.equal(example.logits(frozen), example.logits())


@each_how
def test_groups_learn_too(how):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 8), nn.GELU(), nn.Linear(8, 4)), torch.randn(20, 16)
    qt.quantize(model, 4, weights=8, data=[x], **options_of(how))
    qt.learn_scales(model, how)
    model(x).square().sum().backward()
    assert model[0].weight.grad.abs().sum() > 0
    learned = model(x)
    qt.freeze_scales(model)
    assert torch.equal(model(x), learned)


@pytest.mark.parametrize("how", ["lsq+", "dorefa"])
def test_a_frozen_model_is_exported(how, tmp_path):
    torch.manual_seed(0)
    example = shallow("vit")
    qt.quantize(example.model, 6, data=[example.inputs], **options_of(how))
    parameters = qt.learn_scales(example.model, how)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.05)
    path = tmp_path / "model.onnx"
    with pytest.raises(ValueError, match="are being learned: call freeze_scales first"):
        qt.export_onnx(example.model, example.inputs, path)
    qt.freeze_scales(example.model)
    qt.export_onnx(example.model, example.inputs, path)
    found = qt.verify(path, example.model, [example.inputs])
    assert found.passed, str(found)


@pytest.mark.parametrize("how", ["lsq+", "pact", "dorefa"])  # lsq has a file of its own
def test_a_compiled_model_learns_the_same(how):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 4)), torch.randn(20, 6)
    qt.quantize(model, 4, data=[x], **options_of(how))
    parameters = qt.learn_scales(model, how)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    gradients = []
    for one in (model, compiled):
        model.zero_grad()
        one(2 * x).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > len(parameters)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_tied_and_computed_weights_are_followed_but_not_squashed():
    example, _, _ = learning("dorefa", "gpt2")
    tops = {n: q.top for n, (_, q) in weight_quantizers(example.model).items()}
    alone = [n for n, top in tops.items() if top is not None]
    assert "lm_head.weight_quantizer" not in alone
    assert len(alone) == 4
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 2))
    qt.quantize(model, 4, data=[torch.randn(5, 4)])
    qt.learn_scales(model, "dorefa")
    assert [q.top is None for _, q in weight_quantizers(model).values()] == [True, False]


# ------------------------------------------------------------------ refused


def test_what_cannot_be_learned_is_refused_by_name():
    x = torch.randn(12, 8)

    def model(**options):
        return qt.quantize(nn.Sequential(nn.Linear(8, 8)), 4, data=[x], **options)

    with pytest.raises(ValueError, match=r"how must be one of lsq, lsq\+, pact, dorefa, got 'qat'"):
        qt.learn_scales(model(), "qat")
    with pytest.raises(
        ValueError, match=r"lsq\+ learns an offset, which symmetric grids have none"
    ):
        qt.learn_scales(model(), "lsq+")
    for how in ("pact", "dorefa"):
        with pytest.raises(ValueError, match=r"a method chose the codes of 0\.weight_quantizer"):
            qt.learn_scales(model(methods=["gptq"]), how)
    rounded = model(methods=["gptq"], symmetric=False)
    scale = rounded[0].weight_quantizer.scale.clone()
    qt.learn_scales(rounded, "lsq+")
    assert torch.equal(rounded[0].weight_quantizer.scale, scale)
    for how in HOWS:
        learning_one = model(**options_of(how))
        qt.learn_scales(learning_one, how)
        with pytest.raises(ValueError, match="already: call freeze_scales"):
            qt.learn_scales(learning_one, "lsq")
        with pytest.raises(ValueError, match=r"call freeze_scales\(model\) first"):
            requantize(learning_one, 4, "channel")


@pytest.mark.parametrize("value", [torch.nan, -1.0, torch.inf])
def test_a_file_with_a_top_that_is_none_is_refused(value, tmp_path):
    example, _, _ = learning("dorefa")
    example.model.head.weight_quantizer.top.fill_(value)
    qt.save(example.model, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"head\.weight_quantizer\.top must be a magnitude"):
        qt.load(MODELS["vit"]().model, tmp_path / "model.safetensors")


def test_a_file_with_a_shift_that_is_none_is_refused(tmp_path):
    example, _, _ = learning("lsq+")
    example.model.head.input_quantizer.shift.data.fill_(torch.nan)
    qt.save(example.model, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"head\.input_quantizer\.shift must be finite"):
        qt.load(MODELS["vit"]().model, tmp_path / "model.safetensors")
