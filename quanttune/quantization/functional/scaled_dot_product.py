"""scaled_dot_product_attention, spelled out so that what it multiplies can be rounded."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Round = Callable[[str, Tensor], Tensor]  # the part of attention, and its tensor


def attention(
    round: Round,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Compute attention as torch.nn.functional.scaled_dot_product_attention does, at its edges too.

    A query that sees no key gets zeros, and passes no gradient on.

    Args:
        round: is given the parts "query" (scaled already), "key", "value", "score", "probability"
            and "answer" (before the zeros), and returns what goes on in their place.
        others: as in PyTorch; query (..., heads, queries, channels).
    """
    if attn_mask is not None and is_causal:
        raise RuntimeError("attention takes attn_mask or is_causal, not both")
    # before it is rounded, where there are fewer values than scores
    query = query * (query.shape[-1] ** -0.5 if scale is None else scale)
    query, key, value = round("query", query), round("key", key), round("value", value)
    if enable_gqa:
        heads = query.shape[-3]
        key, value = (x.repeat_interleave(heads // x.shape[-3], -3) for x in (key, value))
    scores = round("score", query @ key.transpose(-2, -1))
    scores, seeing = masked(scores, attn_mask, is_causal)
    probability = F.dropout(scores.softmax(-1), dropout_p)
    answer = round("answer", round("probability", probability) @ value)
    return answer if seeing is None else answer * seeing


def masked(
    scores: Tensor, attn_mask: Tensor | None, is_causal: bool
) -> tuple[Tensor, Tensor | None]:
    """Mask scores, and return besides what the answer is multiplied by.

    A query without a key sees all, since of none comes NaN, and has a 0 in the second. What is
    added is as small as the mask: runtimes add and multiply faster than they select.
    """
    if is_causal:
        options: dict[str, Any] = {"dtype": torch.bool, "device": scores.device}
        unseen = ~torch.ones(scores.shape[-2:], **options).tril()
        return scores + _infinite(unseen, scores), None
    if attn_mask is None:
        return scores, None
    is_bool = attn_mask.dtype == torch.bool
    seeing = (attn_mask if is_bool else ~attn_mask.isneginf()).any(-1, keepdim=True)
    if is_bool:
        added = _infinite(seeing & ~attn_mask, scores)
    else:
        added = attn_mask.to(scores.dtype).masked_fill(~seeing, 0)
    return scores + added, seeing.to(scores.dtype)


def _infinite(unseen: Tensor, scores: Tensor) -> Tensor:
    """Return -inf where a key is unseen, else 0."""
    return torch.zeros_like(unseen, dtype=scores.dtype).masked_fill(unseen, -torch.inf)
