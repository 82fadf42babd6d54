"""Attention, spelled out, beside torch.nn.functional's, with nothing rounded."""

import pytest
import torch
from torch.nn import functional as F

from quanttune.quantization.functional.scaled_dot_product import attention

B, H, T, S, D = 2, 4, 5, 7, 8


def masks():
    """Return masks of every kind, some with queries that see no key."""
    causal = torch.ones(T, S, dtype=torch.bool).tril()
    padded = causal.repeat(B, 1, 1, 1)
    padded[0, :, :3, :3] = False  # left padding: the first queries see nothing
    floats = torch.zeros(B, 1, T, S).masked_fill(~padded, -torch.inf)
    return {
        "none": None,
        "bool": causal,
        "bool, rows without a key": padded,
        "float": torch.randn(B, H, T, S),
        "float, rows without a key": floats,
        "float, of large numbers": torch.zeros(B, 1, T, S).masked_fill(~padded, -1e4),
        "one row for all": (torch.arange(S) < 4)[None, None, None],
        "nothing at all": torch.zeros(T, S, dtype=torch.bool),
    }


@pytest.mark.parametrize("mask", masks())
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("groups", [1, 2])
def test_values_and_gradients_are_those_of_pytorch(mask, scale, groups):
    options = {"attn_mask": masks()[mask], "scale": scale, "enable_gqa": groups > 1}
    if options["attn_mask"] is not None and options["attn_mask"].is_floating_point():
        options["attn_mask"] = options["attn_mask"].double()
    heads = (H, H // groups, H // groups)
    shapes = [(B, h, t, D) for h, t in zip(heads, (T, S, S), strict=True)]
    tensors = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    ours = attention(lambda _, x: x, *tensors, **options)
    theirs = F.scaled_dot_product_attention(*tensors, **options)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    weights = torch.randn(ours.shape, dtype=torch.float64)
    for mine, yours in zip(
        torch.autograd.grad((ours * weights).sum(), tensors),
        torch.autograd.grad((theirs * weights).sum(), tensors),
        strict=True,
    ):
        assert mine.isfinite().all()
        torch.testing.assert_close(mine, yours, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("sizes", [(5, 5), (3, 6), (6, 3)])
def test_causal_attention_is_that_of_pytorch(sizes):
    queries, keys = sizes
    query = torch.randn(B, H, queries, D)
    key, value = torch.randn(2, B, H, keys, D)
    ours = attention(lambda _, x: x, query, key, value, is_causal=True)
    theirs = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_dropout_keeps_the_mean():
    query, key = torch.randn(2, 1, 1, 4, D)
    value = torch.ones(1, 1, 4, 4096)
    y = attention(lambda _, x: x, query, key, value, dropout_p=0.25)
    # each probability is dropped or grows by 4 / 3, for all channels of the value alike
    kept = (y[0, 0, :, :1] == y[0, 0]).all()
    assert kept
    assert attention(lambda _, x: x, query, key, value).allclose(torch.ones(()))


def test_two_masks_are_refused_as_pytorch_refuses_them():
    query, key, value = torch.randn(3, B, H, T, D)
    with pytest.raises(RuntimeError, match="not both"):
        attention(lambda _, x: x, query, key, value, torch.ones(T, T, dtype=torch.bool), 0.0, True)


def test_parts_are_handed_over_in_order_and_used():
    query, key, value = torch.randn(3, B, H, T, D)
    seen = []

    def double(part, x):
        seen.append(part)
        return 2 * x if part == "value" else x

    y = attention(double, query, key, value)
    assert seen == ["query", "key", "value", "score", "probability", "answer"]
    torch.testing.assert_close(y, 2 * F.scaled_dot_product_attention(query, key, value))
