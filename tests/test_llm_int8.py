"""LLM.int8(): outlier columns are products of floats, the others of integers by row and column."""

import copy

import pytest
import torch
from models import MODELS, gpt2
from torch import nn

import quanttune as qt
from quanttune.quantization.methods import LLMInt8
from quanttune.quantization.state import quantizers


def outlying(tokens: int = 9, channels: int = 16) -> torch.Tensor:
    """Return inputs of which channels 3 and 7 hold outliers, 7 in one token."""
    x = torch.randn(2, tokens, channels)
    x[..., 3] *= 30
    x[0, 4, 7] = -6.5
    return x.clamp(-60, 60)


def of_linear(x, bias=True, **options):
    layer = nn.Linear(x.shape[-1], 6, bias=bias)
    options = {"calibrator": "dynamic", "coverage": "linear_inputs", **options}
    return layer, qt.quantize(nn.Sequential(copy.deepcopy(layer)), methods=["llm_int8"], **options)


def by_hand(x, layer, bits=8):
    """Do in float64 what section 3 of the paper says."""
    rows, weight = x.double().flatten(0, -2), layer.weight.detach().double()
    outliers = (rows.abs() >= 6).any(0)
    top = 2 ** (bits - 1) - 1
    a = rows[:, ~outliers]
    of_rows = (a.abs().amax(1, keepdim=True) / top).float().double()
    of_columns = (weight.abs().amax(1, keepdim=True) / top).float().double()
    codes = (a / of_rows).round(), (weight / of_columns).round()[:, ~outliers]
    integers = codes[0] @ codes[1].T * of_rows * of_columns.T
    floats = rows[:, outliers] @ weight[:, outliers].T
    bias = 0 if layer.bias is None else layer.bias.detach().double()
    return (integers + floats + bias).view(*x.shape[:-1], -1), outliers


@pytest.mark.parametrize("bits", [8, 6])
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_what_the_paper_says(bits, bias):
    x = outlying()
    layer, model = of_linear(x, bias, bits=bits)
    wanted, outliers = by_hand(x, layer, bits)
    assert outliers.nonzero().flatten().tolist() == [3, 7]
    torch.testing.assert_close(model(x).double(), wanted, rtol=1e-5, atol=1e-5)


def test_outlier_columns_are_the_float_product():
    x = outlying()
    x[..., [c for c in range(16) if c not in (3, 7)]] = 0
    layer, model = of_linear(x)
    torch.testing.assert_close(model(x), layer(x), rtol=1e-6, atol=1e-6)
    integers = qt.quantize(nn.Sequential(copy.deepcopy(layer)), calibrator="dynamic")
    assert (integers(x) - layer(x)).abs().max() > 100 * (model(x) - layer(x)).abs().max()


def test_a_threshold_of_its_own_and_what_is_no_outlier():
    x = outlying()
    layer = nn.Linear(16, 6)
    model, plain = (
        qt.quantize(nn.Sequential(copy.deepcopy(layer)), calibrator="dynamic", methods=[method])
        for method in (LLMInt8(threshold=1e9), LLMInt8(threshold=1e-9))
    )
    rows = (x / x.abs().amax(-1, keepdim=True) * 127).round() * x.abs().amax(-1, keepdim=True) / 127
    seen = model[0].input_quantizer(x)
    torch.testing.assert_close(seen, rows, rtol=1e-5, atol=1e-6)
    assert torch.equal(plain[0].input_quantizer(x), x)
    with pytest.raises(ValueError, match="threshold must be positive, got 0"):
        LLMInt8(threshold=0)


@pytest.mark.parametrize("calibrator", ["minmax", "dynamic"])
@pytest.mark.parametrize("name", ["vit", "opt", "gpt2"])
def test_models_are_saved_loaded_and_told(name, calibrator, tmp_path):
    example = {**MODELS, "gpt2": gpt2}[name]()
    example.model.eval()
    exact = example.logits()
    fresh = copy.deepcopy(example.model)
    model = qt.quantize(
        example.model, coverage="linear_inputs", calibrator=calibrator,
        methods=[LLMInt8(threshold=2.0)], data=[example.inputs],
    )  # fmt: skip
    assert {q.grid for q in quantizers(model).values()} == {"outlier_columns"}
    assert (example.logits() - exact).norm() < 0.05 * exact.norm()
    qt.save(model, tmp_path / "model.safetensors")
    again = qt.load(fresh, tmp_path / "model.safetensors").eval()
    assert torch.equal(example.logits(again), example.logits())
    assert " outlier_columns" in str(qt.summary(again))
    assert example.logits(copy.deepcopy(model)).isfinite().all()
    example.task_loss().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if n.endswith("fc1.weight"))
    example.logits(model.bfloat16() if name != "vit" else model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coverage": "weight_only"}, "llm_int8 is for inputs of Linear modules, none of which"),
        ({"symmetric": False}, "llm_int8 has symmetric rows"),
        ({"methods": ["llm_int8", "gptq"]}, "multiplies with weights as they were, which gptq"),
    ],
)
def test_where_it_does_not_apply(options, message):
    example = MODELS["vit"]()
    with pytest.raises(ValueError, match=message):
        qt.quantize(example.model, data=[example.inputs], **{"methods": ["llm_int8"], **options})
    assert type(example.model.head) is nn.Linear
