"""Scales that are searched, beside a search by hand in float64; metrics beside numpy and scipy."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from models import shallow, with_padding
from torch import nn

import quanttune as qt
from quanttune import fake_quant
from quanttune.quantization.methods import PTQ4ViT, Ranking
from quanttune.quantization.methods.ptq4vit import BasePTQ
from quanttune.quantization.methods.rounding.moments import groups_of
from quanttune.quantization.methods.searching import scale_search
from quanttune.quantization.methods.searching.alternation import take_turns
from quanttune.quantization.methods.searching.metrics import METRICS, Product, ranking
from quanttune.quantization.methods.searching.products import Linears, attentions_of, record
from quanttune.quantization.running import Data, in_float
from quanttune.quantization.state import quantizers

# ------------------------------------------------------------------ metrics


def loss(metric, exact, rounded, by_channel=False, **more):
    parts = zip(exact.split(3), rounded.split(3), strict=True)
    given = {name: x.split(3) for name, x in more.items()}
    sums = [
        metric.sums(Product(e, **{name: xs[i] for name, xs in given.items()}), r, by_channel)
        for i, (e, r) in enumerate(parts)
    ]
    return metric.of(sums).numpy()


@pytest.mark.parametrize("by_channel", [False, True])
def test_metrics_of_batches_are_those_of_all(by_channel):
    exact = 3 + torch.randn(8, 5)
    rounded, gradient = exact + 0.1 * torch.randn(8, 5), torch.randn(8, 5)
    pairs = (exact.double().numpy(), rounded.double().numpy(), gradient.double().numpy())
    columns = [tuple(x[:, i] for x in pairs) for i in range(5)]
    columns = columns if by_channel else [tuple(x.ravel() for x in pairs)]
    expected = {
        "mse": [((r - e) ** 2).sum() for e, r, _ in columns],
        "hessian": [((g * (r - e)) ** 2).sum() for e, r, g in columns],
        "cosine": [1 - e @ r / np.linalg.norm(e) / np.linalg.norm(r) for e, r, _ in columns],
        "pearson": [1 - np.corrcoef(e, r)[0, 1] for e, r, _ in columns],
    }
    for name, metric in METRICS.items():
        found = loss(metric, exact, rounded, by_channel, gradient=gradient)
        np.testing.assert_allclose(found, expected[name], rtol=1e-4, err_msg=name)


def test_padding_takes_no_part():
    exact, rounded = torch.randn(6, 4), torch.randn(6, 4)
    counted = (torch.arange(6) < 4)[:, None]
    for name, metric in {**METRICS, "rank": ranking(0.5, 0.2, 64)}.items():
        more = {"gradient": torch.randn(6, 4)}
        all_but = loss(metric, exact[:4], rounded[:4], gradient=more["gradient"][:4])
        found = loss(metric, exact, rounded, counted=counted, **more)
        np.testing.assert_allclose(found, all_but, rtol=1e-5, err_msg=name)


def test_a_gradient_of_one_makes_the_hessian_metric_the_squared_error():
    exact, rounded = torch.randn(6, 4), torch.randn(6, 4)
    hessian = loss(METRICS["hessian"], exact, rounded, gradient=torch.ones(6, 4))
    assert hessian == loss(METRICS["mse"], exact, rounded)


def penalty(exact, rounded, margin=0.2):
    """Return the penalty alone: a metric of the correlation is told apart by the weight."""
    losses = [loss(ranking(w, margin, 64), exact, rounded).item() for w in (1.0, 2.0)]
    return losses[1] - losses[0]


def test_penalties_of_order_by_hand():
    exact = torch.tensor([[0.0, 1.0, 3.0]])
    assert penalty(exact, exact) == pytest.approx(0, abs=1e-6)  # gaps beyond the margin
    swapped = torch.tensor([[1.0, 0.0, 3.0]])  # one pair of three, at a distance of 1
    assert penalty(exact, swapped) == pytest.approx((0.2 + 1) / 3, rel=1e-5)
    constant = torch.full((1, 3), 0.5)
    assert penalty(exact, constant) == pytest.approx(0.2, rel=1e-5)


def test_pairs_are_drawn_once_where_there_are_many():
    exact, rounded = torch.randn(40, 50), torch.randn(40, 50)
    every = loss(ranking(100.0, 0.2, 10**6), exact, rounded).item()
    some = loss(ranking(100.0, 0.2, 64), exact, rounded).item()
    assert some == loss(ranking(100.0, 0.2, 64), exact, rounded).item()
    assert 0 < abs(some - every) < 0.1 * every


# ------------------------------------------------------------------ the search


def outlying():
    """Return a Linear without a bias, and inputs with a few outliers."""
    x = torch.randn(40, 16) @ torch.randn(16, 16)
    x[::9, 3] *= 8
    return nn.Sequential(nn.Linear(16, 6)), x


def by_hand(model, x, low, high, rounds, bits):
    """Return the range of inputs and the scales of rows by a search over squared errors."""
    weight, top = model[0].weight.detach().double(), 2 ** (bits - 1) - 1
    exact = x.double() @ weight.T
    factors = [1.0, *np.linspace(low, high, 100)]
    scale_x, scales = x.abs().max().double() / top, weight.abs().amax(1) / top

    def rounded(t, s):
        return (t / s).round().clamp(-top - 1, top) * s

    best_x, best_w = 1.0, np.ones(len(weight))
    for _ in range(rounds):
        given = rounded(x.double(), scale_x * best_x)
        losses = [(given @ rounded(weight, (scales * f)[:, None]).T - exact).square().sum(0)
                  for f in factors]  # fmt: skip
        best_w = np.array(factors)[torch.stack(losses).argmin(0).numpy()]
        rows = rounded(weight, (scales * torch.tensor(best_w))[:, None])
        losses = [(rounded(x.double(), scale_x * f) @ rows.T - exact).square().sum().item()
                  for f in factors]  # fmt: skip
        best_x = factors[int(np.argmin(losses))]
    return (scale_x * best_x).item(), scales.numpy() * best_w


def row_errors(weight, x, scale_x, scales, bits):
    """Return what each row loses by scales, in float64."""
    top = 2 ** (bits - 1) - 1
    x, weight, scales = x.double(), weight.double(), torch.tensor(scales)[:, None]
    rows = (weight / scales).round().clamp(-top - 1, top) * scales
    given = (x / scale_x).round().clamp(-top - 1, top) * scale_x
    return (given @ rows.T - x @ weight.T).square().sum(0)


@pytest.mark.parametrize("rounds", [1, 3])
def test_the_search_is_one_by_hand(rounds):
    model, x = outlying()
    method = PTQ4ViT(metric="mse", rounds=rounds, samples=64)
    weight = model[0].weight.detach().clone()
    wanted, rows = by_hand(model, x, method.low, method.high, rounds, 5)
    found = qt.quantize(model, 5, coverage="linear", methods=[method], data=list(x.split(10)))
    assert found[0].input_quantizer.scale.item() == pytest.approx(wanted, rel=1e-5)
    ours = found[0].weight_quantizer.scale.double().numpy()
    # of near ties float32 may take another
    assert np.isclose(ours, rows, rtol=1e-5).mean() > 0.6
    plain = weight.abs().amax(1).double().numpy() / 15
    scales = (wanted, ours), (wanted, rows), (x.abs().max().item() / 15, plain)
    found, expected, before = (row_errors(weight, x, a, b, 5).sum().item() for a, b in scales)
    assert found == pytest.approx(expected, rel=5e-3)
    assert found < 0.95 * before


@pytest.mark.parametrize("coverage", ["linear", "full"])
@pytest.mark.parametrize("method", [BasePTQ(), PTQ4ViT(), Ranking(), PTQ4ViT(metric="mse")],
                         ids=lambda m: f"{m.name}-{m.metric}")  # fmt: skip
def test_no_product_is_worse_than_with_min_max_by_the_metric(method, coverage):
    example = shallow("vit")
    data = [torch.randn(8, 3, 16, 16)]
    plain, searched = (
        qt.quantize(copy.deepcopy(example.model), 5, coverage=coverage, methods=m, data=data)
        for m in ([], [method])
    )
    given = Data(data)
    with in_float(plain):
        groups = groups_of(plain, given)
    products = [*map(Linears, groups), *attentions_of(plain)]
    better = 0
    for one, records in zip(products, record(plain, products, given, True), strict=True):
        metric = method.metric_of(one)
        before, after = (product_loss(metric, model, plain, one, records)
                         for model in (plain, searched))  # fmt: skip
        assert after <= before * (1 + 1e-5) + 1e-9
        better += after < 0.99 * before
    assert better >= len(products) // 2


def product_loss(metric, model, plain, one, records):
    """Return what a product loses by the quantizers of a model."""
    names = {module: name for name, module in plain.named_modules()}
    if isinstance(one, Linears):
        (layer,) = one.layers
        module = model.get_submodule(names[layer.module])
        x = records.left[0]
        norm = plain.blocks[0].norm1 if "qkv" in names[layer.module] else None
        norm = plain.blocks[0].norm2 if "fc1" in names[layer.module] else norm
        norm = plain.norm if names[layer.module] == "head" else norm
        if hasattr(norm, "output_quantizer") and names[layer.module] != "head":
            x = norm.output_quantizer.round(x)
        exact = records.left[0] @ layer.module.weight.T
        if names[layer.module] == "head" and hasattr(norm, "output_quantizer"):
            return 0.0  # of a part of the norm's output
        rounded = module.input_quantizer.round(x) @ module.weight_quantizer(module.weight).T
        product = Product(exact.detach(), records.gradients[layer.module][0])
        return metric.of([metric.sums(product, rounded.detach(), True)]).mean().item()
    module = model.get_submodule(names[one.module])
    exact = one.multiply(records.left[0], records.right[0])
    factors = [
        module.get_submodule(name).round(x)
        for name, x in zip(one.names, (records.left[0], records.right[0]), strict=False)
    ]
    product = Product(exact, records.gradients[one.module][0])
    return metric.of([metric.sums(product, one.multiply(*factors), False)]).item()


def test_factors_and_gradients_are_those_of_attention():
    """Beside autograd, on a product that is spelled out; no gradient is zero."""
    example = shallow("vit")
    data = [torch.randn(4, 3, 16, 16)]
    model = qt.quantize(copy.deepcopy(example.model), 8, coverage="linear", data=data)
    products = attentions_of(model)
    found = record(model, products, Data(data), True)
    scores, answers = found
    probability = scores.left[0] @ scores.right[0].transpose(-1, -2)
    torch.testing.assert_close(probability.softmax(-1), answers.left[0])
    for records in found:
        (gradient,) = records.gradients[products[0].module]
        assert gradient.abs().mean() > 1e-6
    # the gradient of scores is what softmax passes of that of the answer
    p, value = answers.left[0], answers.right[0]
    into = answers.gradients[products[0].module][0] @ value.transpose(-1, -2)
    expected = p * (into - (p * into).sum(-1, keepdim=True))
    torch.testing.assert_close(scores.gradients[products[0].module][0], expected)
    assert all("answer" not in name for name, _ in model.named_modules())


def test_few_products_at_a_time_give_the_same_scales(monkeypatch):
    example = shallow("vit")
    data = [torch.randn(8, 3, 16, 16)]
    models = []
    for size in (2**30, 1):
        monkeypatch.setattr(scale_search, "BYTES", size)
        options = {"coverage": "linear", "methods": ["ptq4vit"], "data": data}
        models.append(qt.quantize(copy.deepcopy(example.model), 6, **options))
    one, other = (m.state_dict() for m in models)
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=0, equal_nan=True)


def test_a_few_samples_are_enough_and_ranges_are_of_all():
    model, x = outlying()
    x[-1] *= 10
    few = qt.quantize(copy.deepcopy(model), 8, coverage="linear", data=list(x.split(10)),
                      methods=[BasePTQ(samples=20, low=0.9, high=1.0)])  # fmt: skip
    covered = few[0].input_quantizer.absmax.item()
    assert 0.89 < covered / x.abs().max().item() < 1.01


def test_biases_take_the_mean_error_of_a_layer():
    model, x = outlying()
    options = {"coverage": "linear", "data": [x], "methods": [Ranking(samples=100)]}
    found = qt.quantize(copy.deepcopy(model), 4, **options)
    torch.testing.assert_close(found(x).mean(0), model(x).mean(0), rtol=1e-4, atol=1e-5)


def test_biases_take_the_mean_error_that_layers_before_have_left_too():
    """Corrected one by one behind exact inputs, MiniLM's cosine fell from .56 to .03."""
    first, x = outlying()
    width = first[0].out_features
    model = nn.Sequential(first[0], nn.GELU(), nn.Linear(width, width))
    options = {"coverage": "linear", "data": [x], "methods": [Ranking(samples=100)]}
    found = qt.quantize(copy.deepcopy(model), 4, **options)
    torch.testing.assert_close(found(x).mean(0), model(x).mean(0), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[:2](x).mean(0), model[:2](x).mean(0), atol=1e-3)


@pytest.mark.parametrize(
    ("first", "second", "taken"),
    [
        ([False], [False], "12"),  # the second has its turn though the first stays
        ([False, True, False], [True, True], "12121"),
        ([True, True, True], [True, False], "1212"),  # the first was chosen for that second
        ([True] * 9, [True] * 9, "121212"),  # three rounds, at most
    ],
)
def test_factors_take_turns_until_one_stays(first, second, taken):
    changes, calls = {"1": iter(first), "2": iter(second)}, []

    def turn(name):
        calls.append(name)
        return next(changes[name])

    take_turns(partial(turn, "1"), partial(turn, "2"), 3)
    assert "".join(calls) == taken


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "l3"}, "metric must be one of mse, hessian, cosine, pearson, got 'l3'"),
        ({"low": 0.0}, r"factors must go from above 0 to more, got 0.0 to 1.2"),
        ({"low": 2.0}, r"factors must go from above 0 to more, got 2.0 to 1.2"),
        ({"candidates": 1}, "candidates must be a whole number from 2, got 1"),
        ({"rounds": 0}, "rounds and samples must be 1 or more, got 0 and 32"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        PTQ4ViT(**options)


def test_layers_of_one_tensor_keep_one_scale():
    """BERT's queries, keys and values are three Linear modules."""
    example = shallow("bert")
    model = qt.quantize(example.model, 6, coverage="linear", methods=["ptq4vit"],
                        data=[example.inputs])  # fmt: skip
    scales = {
        quantizer.scale.item()
        for name, quantizer in quantizers(model).items()
        if name.endswith(
            ("self.query.input_quantizer", "self.key.input_quantizer", "self.value.input_quantizer")
        )
    }
    assert len(scales) == 1


def test_weights_are_on_the_grid_that_was_found():
    model, x = outlying()
    before = model[0].weight.detach().clone()
    found = qt.quantize(model, 5, coverage="linear", methods=["base_ptq"], data=[x])[0]
    expected = fake_quant(before, found.weight_quantizer.scale, 5, 0)
    assert torch.equal(found.weight, expected)


@pytest.mark.parametrize("method", [PTQ4ViT(twin=False), BasePTQ(), Ranking()],
                         ids=lambda m: m.name)  # fmt: skip
def test_padded_tokens_change_nothing(method):
    example = shallow("bert")
    found = []
    for batch in with_padding(example.inputs):
        options = {"coverage": "linear", "methods": [method], "data": [batch]}
        model = qt.quantize(copy.deepcopy(example.model), 6, **options)
        scales = {name: q.scale for name, q in quantizers(model).items()}
        found.append(torch.stack(list(scales.values())))
    # sums in another order may turn a near tie
    assert torch.isclose(*found, rtol=1e-4).float().mean() > 0.9


class Sums(nn.Module):
    """Products that are matrix products of their factors as they come, and one that is none."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.head = nn.Linear(8, 24), nn.Linear(8, 3)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        p = torch.einsum("bqd,bkd->bqk", q, k).softmax(-1)
        return self.head(p @ v)


def test_products_of_other_dimensions_keep_their_ranges():
    x = 3 * torch.randn(16, 5, 8)
    x[0, 0] *= 6
    untouched, method = Sums(), PTQ4ViT(metric="mse", low=0.3, twin=False)
    plain, found = (
        qt.quantize(copy.deepcopy(untouched), 4, coverage="linear", methods=m, data=[x])
        for m in ([], [method])
    )
    scales = [{n: q.scale.item() for n, q in quantizers(m).items()} for m in (plain, found)]
    changed = {name for name, scale in scales[0].items() if scales[1][name] != scale}
    assert not changed & {"product0_left_quantizer", "product0_right_quantizer"}
    assert changed & {"product1_left_quantizer", "product1_right_quantizer"}
