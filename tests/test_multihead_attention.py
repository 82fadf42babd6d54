"""nn.MultiheadAttention in operations that are seen, against torch's own."""

import copy
import pickle

import pytest
import torch
from torch import nn

import quanttune as qt
from quanttune.quantization.passes import in_float

WIDTH, HEADS, SAMPLES, QUERIES, KEYS = 8, 2, 3, 4, 5


class Attention(nn.Module):
    """MultiheadAttention with the rest of its arguments fixed, so that `quantize` can call it."""

    def __init__(self, arguments, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, **options)
        for parameter in self.attention.parameters():  # biases begin as zeros
            nn.init.normal_(parameter, 0, 0.3)
        self.arguments = arguments

    def forward(self, x):
        return self.attention(*x, **self.arguments) if isinstance(x, list) else self.attention(x, x, x, **self.arguments)


def given(self_attention, first, batched=True, key=WIDTH, value=WIDTH):
    """Return query, key and value as `batch_first` wants them."""

    def one(tokens, width):
        if not batched:
            return torch.randn(tokens, width)
        return torch.randn(*((SAMPLES, tokens) if first else (tokens, SAMPLES)), width)

    if self_attention:
        x = one(QUERIES, WIDTH)
        return [x, x, x]
    return [one(QUERIES, WIDTH), one(KEYS, key), one(KEYS, value)]


BOOL = torch.rand(QUERIES, KEYS, generator=torch.Generator().manual_seed(1)) > 0.6
BOOL[:, 0] = False  # torch has no answer where nothing is attended to
FLOATS = torch.randn(QUERIES, KEYS, generator=torch.Generator().manual_seed(2))
EACH = torch.randn(SAMPLES * HEADS, QUERIES, KEYS, generator=torch.Generator().manual_seed(3))
PADDING = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]])
CAUSAL = torch.ones(QUERIES, QUERIES, dtype=torch.bool).triu(1)

CASES = {
    "self": ({}, {}, given(True, False)),
    "self, batch first": ({"batch_first": True}, {}, given(True, True)),
    "no bias": ({"bias": False}, {}, given(False, False)),
    "one head's weights": ({}, {"average_attn_weights": False}, given(False, False)),
    "without weights": ({}, {"need_weights": False}, given(False, False)),
    "widths": ({"kdim": 6, "vdim": 10}, {}, given(False, False, key=6, value=10)),
    "widths, no bias": ({"kdim": 6, "bias": False}, {}, given(False, False, key=6)),
    "bias_kv": ({"add_bias_kv": True}, {"attn_mask": FLOATS}, given(False, False)),
    "zero_attn": ({"add_zero_attn": True}, {"key_padding_mask": PADDING}, given(False, False)),
    "both": (
        {"add_zero_attn": True, "add_bias_kv": True, "batch_first": True},
        {"need_weights": False, "attn_mask": BOOL},
        given(False, True),
    ),
    "bool mask": ({}, {"attn_mask": BOOL}, given(False, False)),
    "float mask": ({}, {"attn_mask": FLOATS, "need_weights": False}, given(False, False)),
    "3-D mask": ({}, {"attn_mask": EACH}, given(False, False)),
    "3-D bool mask": ({}, {"attn_mask": EACH > 1, "need_weights": False}, given(False, False)),
    "padding": ({}, {"key_padding_mask": PADDING, "need_weights": False}, given(False, False)),
    "padding and mask": (
        {"batch_first": True},
        {"key_padding_mask": PADDING, "attn_mask": BOOL},
        given(False, True),
    ),
    "float padding": (
        {},
        {"key_padding_mask": PADDING.float() * -3, "attn_mask": FLOATS},
        given(False, False),
    ),
    "causal": ({}, {"attn_mask": CAUSAL, "is_causal": True}, given(True, False)),
    "causal, no weights": (
        {"batch_first": True},
        {"attn_mask": CAUSAL, "is_causal": True, "need_weights": False},
        given(True, True),
    ),
    "unbatched": ({}, {}, given(False, False, batched=False)),
    "unbatched, padding": (
        {"batch_first": True},
        {"key_padding_mask": PADDING[1], "average_attn_weights": False},
        given(False, True, batched=False),
    ),
}  # fmt: skip


def answers(model, inputs):
    """Return outputs, weights and gradients."""
    inputs = list(dict.fromkeys(inputs))  # one tensor thrice is one
    inputs = [x.clone().requires_grad_() for x in inputs]
    model.zero_grad()
    output, weights = model(inputs if len(inputs) > 1 else inputs[0])
    loss = (output * torch.arange(output.numel()).view_as(output)).sum()
    if weights is not None:
        loss = loss + (weights * torch.arange(weights.numel()).view_as(weights)).sum()
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters()}
    return output, weights, [x.grad for x in inputs], gradients


@pytest.mark.parametrize("name", CASES)
def test_computes_what_torch_does(name):
    options, arguments, inputs = CASES[name]
    model = Attention(arguments, **options).double().eval()
    inputs = [x.double() if x is inputs[0] or True else x for x in map(torch.Tensor.double, inputs)]
