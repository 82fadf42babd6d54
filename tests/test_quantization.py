"""quantize on real architectures, against hand-quantized layers and against the float model."""

import copy
import pickle
import warnings

import pytest
import torch
from models import MODELS
from torch import nn
from torch.nn import functional as F

import quanttune as qt
from quanttune import fake_quant, quantize
from quanttune.fake_quantizer import scale_of
from quanttune.quantization.requantization import requantize
from quanttune.quantization.saving.description import describe
from quanttune.quantization.state import quantizers, weight_quantizers


class Attention(nn.Module):
    """The smallest model with every kind of functional site; `fused` chooses how it is written."""

    def __init__(self, fused: bool, scale: float | None = None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.qkv = nn.Linear(8, 24)
        self.fused, self.scale = fused, scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self.qkv(self.norm(x)).chunk(3, -1)
        if self.fused:
            return x + F.scaled_dot_product_attention(query, key, value, scale=self.scale)
        scale = 8**-0.5 if self.scale is None else self.scale
        scores = (query * scale) @ key.transpose(-2, -1)  # as in timm
        return x + F.dropout(scores.softmax(-1), 0.1, self.training) @ value


def rounded(x: torch.Tensor, bits: int, calibrated: torch.Tensor | None = None) -> torch.Tensor:
    """The min-max grid, written out: of x itself, or of the float tensor that was `calibrated`."""
    qmax = 2 ** (bits - 1) - 1
    step = (x if calibrated is None else calibrated).abs().max().float() / qmax
    return torch.clamp(torch.round(x / step), -qmax - 1, qmax) * step


@pytest.mark.parametrize("weights", ["channel", "tensor"])
@pytest.mark.parametrize("bits", [8, 6, 5])
def test_linear_is_quantized_like_by_hand(bits, weights):
    model = nn.Sequential(nn.Linear(6, 5))
    x = torch.randn(7, 6)
    weight = model[0].weight.detach()
    by_row = torch.stack([rounded(row, bits) for row in weight])
    weight = by_row if weights == "channel" else rounded(weight, bits)
    output = F.linear(rounded(x, bits), weight, model[0].bias)
    expected = rounded(output, bits, calibrated=model(x)).detach()
    quantize(model, bits, weights=weights, data=[x])
    torch.testing.assert_close(model(x).detach(), expected, rtol=1e-6, atol=1e-7)


def test_linear_coverage_leaves_outputs_alone():
    model = nn.Sequential(nn.Linear(6, 5))
    x = torch.randn(7, 6)
    weight = torch.stack([rounded(row, 8) for row in model[0].weight.detach()])
    expected = F.linear(rounded(x, 8), weight, model[0].bias).detach()
    quantize(model, 8, coverage="linear", data=[x])
    torch.testing.assert_close(model(x).detach(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("layer", [nn.Conv2d(3, 4, 2, stride=2), nn.Conv2d(3, 4, 3, padding=1)])
def test_convolution_is_quantized_like_by_hand(layer):
    x = torch.randn(2, 3, 8, 8)
    weight = torch.stack([rounded(row, 8) for row in layer.weight.detach()])
    options = {"stride": layer.stride, "padding": layer.padding}
    output = F.conv2d(rounded(x, 8), weight, layer.bias, **options)
    expected = rounded(output, 8, calibrated=layer(x)).detach()
    model = quantize(nn.Sequential(copy.deepcopy(layer)), 8, data=[x])
    torch.testing.assert_close(model(x).detach(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weights", ["channel", "tensor"])
def test_embedding_rows_are_on_the_grid(weights):
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 2))
    table = model[0].weight.detach().clone()
    by_row = torch.stack([rounded(row, 6) for row in table])
    expected = by_row if weights == "channel" else rounded(table, 6)
    quantize(model, 6, weights=weights, data=[torch.arange(9)])
    torch.testing.assert_close(model[0](torch.arange(9)).detach(), expected, rtol=1e-6, atol=0)


def test_conv1d_of_gpt2_has_its_outputs_on_axis_one():
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    layer = conv1d(5, 6)
    nn.init.normal_(layer.weight)
    x = torch.randn(3, 6)
    weight = torch.stack([rounded(column, 8) for column in layer.weight.detach().t()])
    output = F.linear(rounded(x, 8), weight, layer.bias)
    expected = rounded(output, 8, calibrated=layer(x)).detach()
    model = quantize(nn.Sequential(layer), 8, data=[x])
    torch.testing.assert_close(model(x).detach(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("coverage", ["linear", "full_no_softmax", "full"])
@pytest.mark.parametrize("name", MODELS)
def test_sixteen_bits_are_nearly_float_and_fewer_are_worse(name, coverage):
    """At 16 bits only rounding is left: attention, spelled out, must be the model's own."""
    example = MODELS[name]()
    model = example.model.eval()
    with torch.no_grad():
        expected = example.logits()
        errors = []
        for bits in (16, 8, 4):
            quantized = copy.deepcopy(model)
            quantize(quantized, bits, coverage=coverage, data=[example.inputs])
            error = (example.logits(quantized) - expected).norm() / expected.norm()
            errors.append(error.item())
    assert 0 < errors[0] < 1e-2
    assert errors[0] < errors[1] / 20
    assert errors[1] < errors[2]


def test_fused_and_written_out_attention_have_the_same_sites_and_numbers():
    x = torch.randn(2, 5, 8)
    outputs, sites = [], []
    for fused in (True, False):
        torch.manual_seed(0)
        model = quantize(Attention(fused).eval(), 6, coverage="full", data=[x])
        outputs.append(model(x).detach())
        sites.append(sorted(f"{q.scale.item():.6g}" for q in quantizers(model).values()))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-5)
    assert sites[0] == sites[1]
    # q, k, v, score, probability, residual, norm in and out, linear in and out
    assert len(sites[0]) == 10


def test_tables_of_embeddings_are_rounded_beside_a_stream_in_float():
    example = MODELS["bert"]()
    quantized, names = {}, {}
    for coverage in ("linear", "linear_embedding"):
        model = copy.deepcopy(example.model.eval())
        quantized[coverage] = quantize(model, 8, coverage=coverage, data=[example.inputs])
        names[coverage] = set(quantizers(model)), set(weight_quantizers(model))
    assert names["linear_embedding"][0] == names["linear"][0]  # the same activations
    tables = {n for n, m in example.model.named_modules() if isinstance(m, nn.Embedding)}
    added = names["linear_embedding"][1] - names["linear"][1]
    assert added == {f"{name}.weight_quantizer" for name in tables}
    weight = example.model.get_input_embeddings().weight.detach()
    ids = torch.arange(1, 9)  # row 0 is padding, all zeros
    table = quantized["linear_embedding"].get_input_embeddings()
    expected = torch.stack([rounded(row, 8) for row in weight[ids]])
    torch.testing.assert_close(table(ids).detach(), expected)
    assert torch.equal(quantized["linear"].get_input_embeddings()(ids), weight[ids])


def test_presets_differ_in_what_they_name():
    x = torch.randn(2, 5, 8)
    names = {}
    for coverage in ("linear_inputs", "linear", "full_no_softmax", "full"):
        model = quantize(Attention(True).eval(), 8, coverage=coverage, data=[x])
        names[coverage] = set(quantizers(model))
    assert names["full"] - names["full_no_softmax"] == {"attention0_probability_quantizer"}
    parts = ("query", "key", "value", "probability")
    attention = {f"attention0_{part}_quantizer" for part in parts}
    assert names["linear"] == attention | {"qkv.input_quantizer"}
    assert names["linear_inputs"] == {"qkv.input_quantizer"}
    float_stream = quantize(Attention(True).eval(), 8, residual=False, data=[x])
    residual = {"add0_quantizer", "norm.input_quantizer"}
    assert names["full_no_softmax"] - set(quantizers(float_stream)) == residual


@pytest.mark.parametrize("causal", [False, True])
def test_masks_of_attention_are_kept(causal):
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q = self.proj(x)[:, None]
            mask = None if causal else (torch.arange(5) < 3)[None, None, None]
            return F.scaled_dot_product_attention(q, q, q, attn_mask=mask, is_causal=causal)

    model, x = Masked().eval(), torch.randn(2, 5, 4)
    expected = model(x).detach()
    quantize(model, 16, data=[x])
    torch.testing.assert_close(model(x).detach(), expected, rtol=2e-3, atol=2e-3)


def test_grouped_queries_and_scale_are_kept():
    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q = self.proj(x).unflatten(-1, (1, 4)).transpose(1, 2).repeat(1, 4, 1, 1)
            k = q[:, :2]
            return F.scaled_dot_product_attention(q, k, k, scale=0.3, enable_gqa=True)

    model, x = Grouped().eval(), torch.randn(2, 5, 4)
    expected = model(x).detach()
    quantize(model, 16, data=[x])
    torch.testing.assert_close(model(x).detach(), expected, rtol=2e-3, atol=2e-3)


def test_requantize_equals_quantizing_anew():
    x = torch.randn(4, 3, 8)
    model = quantize(Attention(True).eval(), 8, data=[x])
    for bits, weights in ((6, "tensor"), (5, "channel")):
        torch.manual_seed(1)
        again = copy.deepcopy(model)
        requantize(again, bits, weights)
        fresh = Attention(True).eval()
        fresh.load_state_dict({k: v for k, v in model.state_dict().items() if "quantizer" not in k})
        quantize(fresh, bits, weights=weights, data=[x])
        assert torch.equal(again(x), fresh(x))


def test_requantize_refuses_ranges_that_were_searched_for_another_width():
    x = torch.randn(4, 3, 8)
    model = quantize(Attention(True).eval(), 8, calibrator="omse", data=[x])
    requantize(model, 8, "tensor")
    with pytest.raises(ValueError, match="omse searched its ranges for 8 bits: quantize the float"):
        requantize(model, 6, "tensor")


def test_weights_may_have_bits_of_their_own():
    x, layer = torch.randn(7, 6), nn.Linear(6, 5)
    weight = torch.stack([rounded(row, 4) for row in layer.weight.detach()])
    expected = F.linear(rounded(x, 8), weight, layer.bias).detach()
    model = quantize(nn.Sequential(layer), 8, weight_bits=4, coverage="linear", data=[x])
    torch.testing.assert_close(model(x).detach(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("overrides", "bits"),
    [
        ({"0": {"bits": 16}}, (16, 16, 16, 8)),
        ({"0.*": {"bits": 6}, "*.weight_quantizer": {"bits": 4}}, (6, 4, 6, 8)),
        ({"*.weight_quantizer": {"bits": 4}, "0.*": {"bits": 6}}, (6, 6, 6, 8)),  # the last counts
        ({"0.output*": None}, (8, 8, None, 8)),
        ({"*": {"bits": 5}, "1": None}, (5, 5, 5, None)),
        ({"0.weight_quantizer": None}, (8, None, 8, 8)),
    ],
)
def test_overrides_are_quantized_like_by_hand(overrides, bits):
    model, x = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5)), torch.randn(7, 6)
    layer = copy.deepcopy(model[0])

    def by_hand(x, bits, calibrated=None):
        return x if bits is None else rounded(x, bits, calibrated)

    weight = torch.stack([by_hand(row, bits[1]) for row in layer.weight.detach()])
    hidden, before = F.linear(by_hand(x, bits[0]), weight, layer.bias), layer(x)
    hidden = by_hand(by_hand(hidden, bits[2], before), bits[3], before)
    expected = by_hand(F.layer_norm(hidden, (5,)), bits[3], F.layer_norm(before, (5,)))
    quantize(model, overrides=overrides, data=[x])
    torch.testing.assert_close(model(x).detach(), expected.detach(), rtol=1e-5, atol=1e-6)


def test_overrides_reach_functional_sites_and_embeddings():
    x = torch.randn(2, 5, 8)
    overrides = {"*score*": None, "add0_quantizer": {"bits": 12}}
    model = quantize(Attention(True).eval(), 8, overrides=overrides, data=[x])
    bits = {name: quantizer.bits for name, quantizer in quantizers(model).items()}
    assert bits.pop("add0_quantizer") == 12
    assert set(bits.values()) == {8}
    plain = quantize(Attention(True).eval(), 8, data=[x])
    assert set(quantizers(plain)) - set(quantizers(model)) == {"attention0_score_quantizer"}
    tables = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 2))
    quantize(tables, overrides={"0": None}, data=[torch.arange(9)])
    assert torch.equal(tables[0](torch.arange(9)), tables[0].weight)


def test_requantize_leaves_in_float_what_an_override_left():
    x = torch.randn(2, 5, 8)
    overrides = {"qkv.weight_quantizer": None, "norm": {"bits": 4}}
    model = quantize(Attention(True).eval(), 8, overrides=overrides, data=[x])
    requantize(model, 6, "channel")
    assert {quantizer.bits for quantizer in quantizers(model).values()} == {6}
    assert isinstance(model.qkv.weight_quantizer, nn.Identity)
    scheme = describe(model)["scheme"]
    assert (scheme["bits"], scheme["overrides"]) == (6, {"qkv.weight_quantizer": None})


def test_the_summary_lists_every_grid():
    x, layer = torch.randn(7, 6), nn.Linear(6, 5)
    weight = layer.weight.abs().max().item()
    model = quantize(nn.Sequential(layer), 8, weight_bits=4, coverage="linear", data=[x])
    text = str(qt.summary(model)).splitlines()
    assert text[0] == "Sequential, coverage linear"
    assert text[1].split() == ["site", "kind", "bits", "granularity", "scale", "absmax"]
    first, second = qt.summary(model).sites
    assert (first.name, first.kind, first.bits) == ("0.weight_quantizer", "weight", 4)
    assert (second.name, second.kind, second.bits) == ("0.input_quantizer", "input", 8)
    assert (first.granularity, second.granularity) == ("channel", "tensor")
    assert first.scale == pytest.approx(weight / 7)
    assert first.absmax == pytest.approx(weight)
    assert second.scale == pytest.approx(x.abs().max().item() / 127)
    assert text[2].split() == [
        "0.weight_quantizer", "weight", "4", "channel", f"{weight / 7:.4g}", f"{weight:.4g}",
    ]  # fmt: skip
    dynamic = quantize(nn.Sequential(nn.Linear(6, 5)), calibrator="dynamic")
    assert {site.scale for site in qt.summary(dynamic).sites if site.kind != "weight"} == {None}
    with pytest.raises(
        ValueError, match=r"Linear is not quantized: call quantize\(model, \.\.\.\)"
    ):
        qt.summary(nn.Linear(6, 5))


def test_min_max_ranges_are_those_of_all_batches():
    batches = [torch.randn(3, 6) * factor for factor in (1.0, 5.0, 2.0)]
    model = quantize(nn.Sequential(nn.Linear(6, 2)), 7, data=iter(batches))
    scale = quantizers(model)["0.input_quantizer"].scale
    assert scale == torch.cat(batches).abs().max() / 63


def test_batches_may_be_tensors_mappings_or_pairs():
    x = torch.randn(3, 6)
    for batch in (x, [x, torch.zeros(3)], (x,), {"input": x}):
        model = quantize(nn.Sequential(nn.Linear(6, 2)), data=[batch])
        assert quantizers(model)["0.input_quantizer"].scale == x.abs().max() / 127


def test_calibration_restores_the_training_mode_and_collects_no_graph():
    model = nn.Sequential(nn.Linear(6, 2), nn.Dropout(0.5)).train()
    quantize(model, data=[torch.randn(3, 6)])
    assert model.training
    assert model[1].training


def test_parameters_names_and_identity_survive():
    model = Attention(True)
    before = dict(model.named_parameters())
    linear = model.qkv
    quantize(model, data=[torch.randn(2, 5, 8)])
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before)
    assert model.qkv is linear
    assert isinstance(linear, nn.Linear)


def test_dynamic_quantization_trains_straight_through():
    model = nn.Sequential(nn.Linear(6, 5))
    x = torch.randn(7, 6, requires_grad=True)
    quantize(model, 4, calibrator="dynamic")
    model(x).sum().backward()
    weight = model[0].weight.detach()
    weight_q = fake_quant(weight, scale_of(weight.abs().amax(1), 4), 4, axis=0)
    x_q = fake_quant(x.detach(), scale_of(x.detach().abs().amax(), 4), 4)
    torch.testing.assert_close(x.grad, weight_q.sum(0).expand(7, 6), rtol=1e-6, atol=1e-7)
    expected = x_q.sum(0).expand(5, 6)
    torch.testing.assert_close(model[0].weight.grad, expected, rtol=1e-6, atol=1e-7)


def test_a_quantized_model_can_be_copied_and_pickled():
    x = torch.randn(2, 5, 8)
    model = quantize(Attention(True).eval(), data=[x])
    copied = copy.deepcopy(model)
    assert torch.equal(copied(x), model(x))
    with torch.no_grad():
        copied.qkv.weight.zero_()
    assert not torch.equal(copied(x), model(x))
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))


def test_an_exception_in_a_forward_leaves_no_mode_behind():
    x = torch.randn(2, 5, 8)
    model = quantize(Attention(True).eval(), data=[x])
    expected = model(x)
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 5, 7))
    a = torch.randn(3, 3)
    assert torch.equal(a @ a, torch.matmul(a, a))  # no site: not quantized
    assert torch.equal(model(x), expected)


def test_modules_that_are_never_called_are_named():
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.bypassed = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    with pytest.warns(UserWarning, match=r"2 site\(s\) were not reached.*bypassed.input_quantizer"):
        model = quantize(Functional(), data=[torch.randn(2, 4)])
    with pytest.raises(RuntimeError, match="never reached during calibration"):
        model.bypassed(torch.randn(2, 4))


def test_a_site_that_appears_after_calibration_is_an_error():
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj, self.twice = nn.Linear(4, 4), False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.proj(x)
            return y + x if self.twice else y

    model = quantize(Sometimes(), data=[torch.randn(2, 4)])
    model.twice = True
    with pytest.raises(
        RuntimeError, match=r"adds activations at .*forward\+2:19-24, which was never reached"
    ):
        model(torch.randn(2, 4))


def broken(value: float) -> torch.Tensor:
    x = torch.randn(3, 6)
    x[1, 2] = value
    return x


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 1}, "bits must be from 2 to 16, got 1"),
        ({"bits": 17}, "bits must be from 2 to 16, got 17"),
        ({"calibrator": "best"}, "calibrator must be one of minmax, ema, percentile, "),
        (
            {"coverage": "all"},
            "coverage must be one of weight_only, linear_inputs, linear, .*, full, got 'all'",
        ),
        (
            {"weights": "row"},
            'weights must be "channel", "tensor" or the size of groups, .* got \'row\'',
        ),
        ({"weight_bits": 0}, "bits must be from 2 to 16, got 0"),
        ({"overrides": {"*": {"bits": 1}}}, "bits must be from 2 to 16, got 1"),
        (
            {"overrides": {"*": {"scale": 1}}},
            r"overrides must map patterns to .* got '\*': {'scale",
        ),
        ({"overrides": {"1*": None}}, "override '1\\*' matches no quantizer .* 0.weight_quantizer"),
        ({"data": None}, "calibrator='minmax' needs data"),
        ({"data": []}, "data is empty: calibration needs at least one batch"),
        ({"data": [broken(float("nan"))]}, "0.input_quantizer held NaN or inf"),
        ({"data": [broken(float("inf"))]}, "0.input_quantizer held NaN or inf"),
        (
            {"data": [broken(float("nan"))], "calibrator": "percentile"},
            "0.input_quantizer held NaN or inf",
        ),
    ],
)
def test_bad_arguments_say_what_was_wanted(options, message):
    arguments = {"data": [torch.randn(3, 6)]} | options
    with pytest.raises(ValueError, match=message):
        quantize(nn.Sequential(nn.Linear(6, 2)), **arguments)


@pytest.mark.parametrize("bits", [[torch.randn(3, 6)], 8.0, "8", None])
def test_what_is_no_width_is_named(bits):
    model = nn.Sequential(nn.Linear(6, 2))
    with pytest.raises(TypeError, match=f"whole number .* of type {type(bits).__name__}"):
        quantize(model, bits, data=[torch.randn(3, 6)])
    assert type(model[0]) is nn.Linear


def test_a_model_without_weights_and_a_quantized_one_are_refused():
    with pytest.raises(ValueError, match="ReLU has no Linear, Conv1D, convolution, Embedding"):
        quantize(nn.ReLU(), data=[torch.randn(2)])
    model = quantize(nn.Sequential(nn.Linear(6, 2)), data=[torch.randn(3, 6)])
    with pytest.raises(ValueError, match="Sequential is quantized already"):
        quantize(model, data=[torch.randn(3, 6)])


@pytest.mark.parametrize("data", [[], [torch.randn(2, 5, 8), broken(float("nan")).expand(1, 3, 6)]])
def test_an_error_leaves_the_model_as_it_was(data):
    model, x = Attention(True).train(), torch.randn(2, 5, 8)
    before = {name: (type(m), len(m._forward_hooks)) for name, m in model.named_modules()}
    keys, output = list(model.state_dict()), model(x)
    with pytest.raises((ValueError, RuntimeError)):
        quantize(model, data=data)
    after = {name: (type(m), len(m._forward_hooks)) for name, m in model.named_modules()}
    assert after == before
    assert list(model.state_dict()) == keys
    assert model.training
    assert torch.equal(model(x), output)
    quantize(model, data=[x])


def test_zeros_stay_zeros():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = quantize(nn.Sequential(nn.Linear(6, 2, bias=False)), data=[torch.zeros(3, 6)])
    assert torch.equal(model(torch.zeros(3, 6)), torch.zeros(3, 2))
