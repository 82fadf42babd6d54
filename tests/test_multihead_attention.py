"""nn.MultiheadAttention in operations that are seen, against torch's own."""

import copy
import pickle

import pytest
import torch
from torch import nn

import quanttune as qt
from quanttune import fake_quant
from quanttune.fake_quantizer import scale_of
from quanttune.quantization.running import in_float

WIDTH, HEADS, SAMPLES, QUERIES, KEYS = 8, 2, 3, 4, 5
SELF = [(QUERIES, WIDTH)]


def _random(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


BOOL = _random(QUERIES, KEYS) > 0.3
BOOL[:, 0] = False  # else a row has nothing to attend to
FLOAT = _random(QUERIES, KEYS, seed=2)
EACH = _random(SAMPLES * HEADS, QUERIES, KEYS, seed=3)
PADDING = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]])
CAUSAL = torch.ones(QUERIES, QUERIES, dtype=torch.bool).triu(1)
WEIGHTLESS = {"need_weights": False}

# options of the module, arguments of its forward, and (tokens, width) of what it attends to
CASES = {
    "self": ({}, {}, SELF),
    "self, batch first": ({"batch_first": True}, WEIGHTLESS, SELF),
    "cross": ({"batch_first": True}, {}, None),
    "no bias": ({"bias": False}, {}, None),
    "weights of heads": ({}, {"average_attn_weights": False}, None),
    "without weights": ({}, WEIGHTLESS, None),
    "widths": ({"kdim": 6, "vdim": 10}, {}, [(QUERIES, WIDTH), (KEYS, 6), (KEYS, 10)]),
    "key's width": ({"kdim": 6, "bias": False}, {}, [(QUERIES, WIDTH), (KEYS, 6), (KEYS, WIDTH)]),
    "add_bias_kv": ({"add_bias_kv": True}, {"attn_mask": FLOAT}, None),
    "add_zero_attn": ({"add_zero_attn": True}, {"key_padding_mask": PADDING}, None),
    "adds both": (
        {"add_zero_attn": True, "add_bias_kv": True, "batch_first": True},
        {**WEIGHTLESS, "attn_mask": BOOL},
        None,
    ),
    "bool mask": ({}, {"attn_mask": BOOL}, None),
    "float mask": ({}, {**WEIGHTLESS, "attn_mask": FLOAT}, None),
    "a mask each": ({}, {"attn_mask": EACH}, None),
    "a bool mask each": ({}, {**WEIGHTLESS, "attn_mask": EACH > 1}, None),
    "padding": ({}, {**WEIGHTLESS, "key_padding_mask": PADDING}, None),
    "padding and mask": (
        {"batch_first": True},
        {"key_padding_mask": PADDING, "attn_mask": BOOL},
        None,
    ),
    "float padding": ({}, {"key_padding_mask": PADDING.double() * -3, "attn_mask": FLOAT}, None),
    "causal": ({}, {"attn_mask": CAUSAL, "is_causal": True}, SELF),
    "causal without weights": ({}, {"attn_mask": CAUSAL, "is_causal": True, **WEIGHTLESS}, SELF),
}  # fmt: skip


class Attention(nn.Module):
    """MultiheadAttention with arguments of its own, which takes its inputs in a list."""

    def __init__(self, arguments, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, **options)
        for parameter in self.attention.parameters():  # biases begin as zeros
            nn.init.normal_(parameter, 0, 0.3)
        self.arguments = arguments

    def forward(self, inputs):
        query, key, value = inputs if len(inputs) == 3 else inputs * 3
        return self.attention(query, key, value, **self.arguments)


def case(name, batched=True):
    options, arguments, sizes = CASES[name]
    model = Attention(arguments, **options).double().eval()
    first = options.get("batch_first")
    inputs = []
    for tokens, width in sizes or [(QUERIES, WIDTH), (KEYS, WIDTH), (KEYS, WIDTH)]:
        samples = (SAMPLES, tokens) if first else (tokens, SAMPLES)
        inputs.append(torch.randn(*(samples if batched else (tokens,)), width).double())
    return model, inputs


def answers(model, inputs):
    """Return outputs, weights, and gradients of inputs and parameters."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    model.zero_grad()
    found = [x for x in model(inputs) if x is not None]
    sum((x * torch.arange(x.numel()).view_as(x)).sum() for x in found).backward()
    parameters = {name: p.grad for name, p in model.named_parameters()}
    return found, [x.grad for x in inputs], parameters


@pytest.mark.parametrize("name", CASES)
def test_computes_what_torch_does(name):
    model, inputs = case(name)
    expected = answers(model, inputs)
    qt.quantize(model, data=[(inputs,)])
    with in_float(model):
        torch.testing.assert_close(answers(model, inputs), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["self", "without weights", "weights of heads", "adds both"])
def test_takes_one_sample_without_a_dimension_for_it(name):
    model, inputs = case(name, batched=False)
    expected = answers(model, inputs)
    qt.quantize(model, data=[(inputs,)])
    with in_float(model):
        torch.testing.assert_close(answers(model, inputs), expected, rtol=1e-9, atol=1e-9)


def test_masks_of_one_sample():
    model, inputs = case("cross", batched=False)
    model.arguments = {"key_padding_mask": PADDING[1], "attn_mask": EACH[:HEADS] > 1}
    expected = answers(model, inputs)
    qt.quantize(model, data=[(inputs,)])
    with in_float(model):
        torch.testing.assert_close(answers(model, inputs), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["cross", "without weights"])
def test_drops_probabilities_in_training(name):
    model, inputs = case(name)
    qt.quantize(model, data=[(inputs,)])
    model.attention.dropout = 0.5
    with in_float(model):
        still = model(inputs)[0]
        model.train()
        torch.manual_seed(1)
        outputs = torch.stack([model(inputs)[0] for _ in range(3000)])
    assert outputs.std(0).min() > 0
    error = outputs.std(0) / len(outputs) ** 0.5
    assert ((outputs.mean(0) - still) / error).abs().max() < 5


@pytest.mark.parametrize("name", ["self", "cross", "key's width"])
@pytest.mark.parametrize("weights", ["channel", "tensor"])
def test_rounds_its_projections(name, weights):
    model, inputs = case(name)
    expected = copy.deepcopy(model)
    for parameter in expected.parameters():
        if parameter.dim() == 2:
            absmax = parameter.detach().abs()
            absmax = absmax.amax(1) if weights == "channel" else absmax.max()
            scale = scale_of(absmax.float(), 4)
            axis = 0 if weights == "channel" else None
            parameter.data = fake_quant(parameter.detach(), scale, 4, axis)
    qt.quantize(model, weight_bits=4, weights=weights, data=[(inputs,)])
    with in_float(model):
        for _, quantizer in qt.quantization.state.weight_quantizers(model).values():
            quantizer.enabled = True
        torch.testing.assert_close(model(inputs)[0], expected(inputs)[0], rtol=1e-6, atol=1e-6)


def test_its_parameters_are_those_of_the_model_elsewhere():
    model, inputs = case("self")
    parameter, names = model.attention.in_proj_weight, set(model.state_dict())
    qt.quantize(model, data=[(inputs,)])
    assert model.attention.in_proj_weight is parameter
    assert names == {name for name in model.state_dict() if "quantizer" not in name}
    sites = {site.name for site in qt.summary(model).sites}
    assert {"attention.in_proj_weight_quantizer", "attention.out_proj.weight_quantizer"} <= sites
    assert {f"attention.linear0_{part}_quantizer" for part in ("input", "output")} <= sites


def test_encoders_do_not_pass_it_by():
    """Without gradients torch.nn.TransformerEncoder computes fused, from parameters."""
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(SAMPLES, KEYS, WIDTH)
    qt.quantize(model, 4, coverage="linear", data=[x])
    with torch.no_grad():
        fused = model(x)
        padded = model(x, src_key_padding_mask=PADDING)
    torch.testing.assert_close(fused, model(x).detach())
    torch.testing.assert_close(padded, model(x, src_key_padding_mask=PADDING).detach())
    with in_float(model):
        assert (model(x) - fused).abs().max() > 0.01


def test_transformers_of_torch_are_quantized():
    class Translator(nn.Module):
        def __init__(self):
            super().__init__()
            self.transformer = nn.Transformer(WIDTH, HEADS, 1, 1, 16, batch_first=True)

        def forward(self, x):
            mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
            return self.transformer(x, x, tgt_mask=mask, tgt_is_causal=True)

    model, x = Translator().eval(), torch.randn(SAMPLES, KEYS, WIDTH)
    expected = model(x).detach()
    qt.quantize(model, data=[x])
    assert 1e-4 < (model(x) - expected).abs().max() < 0.2
    with in_float(model):
        torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_can_be_copied(copied):
    model, inputs = case("self")
    qt.quantize(model, data=[(inputs,)])
    again = copied(model)
    assert torch.equal(again(inputs)[0], model(inputs)[0])
    assert isinstance(again.attention, nn.MultiheadAttention)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attn_mask": torch.zeros(QUERIES, KEYS, dtype=torch.int64)}, "masks must be bool or"),
        ({"is_causal": True}, "give that too"),
    ],
)
def test_refuses_what_torch_does(arguments, message):
    model, inputs = case("cross")
    qt.quantize(model, data=[(inputs,)])
    model.arguments = arguments
    with pytest.raises((TypeError, ValueError), match=message):
        model(inputs)
    with pytest.raises(ValueError, match="2 dimensions or, with samples, 3"):
        model.attention(inputs[0][0], inputs[1], inputs[2])
