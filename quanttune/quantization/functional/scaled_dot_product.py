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
        round: is given the parts "query" (scaled already), "key", "value", "score" and
            "probability", and returns what goes on in their place.
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
    scores, unseeing = _masked(scores, attn_mask, is_causal)
    probability = F.dropout(scores.softmax(-1), dropout_p)
    answer = round("probability", probability) @ value
    return answer if unseeing is None else answer.masked_fill(unseeing, 0)


def _masked(
    scores: Tensor, attn_mask: Tensor | None, is_causal: bool
) -> tuple[Tensor, Tensor | None]:
    """Mask scores. Rows without a key, told as the second, see all: of none comes NaN."""
    if is_causal:
        options: dict[str, Any] = {"dtype": torch.bool, "device": scores.device}
        seen = torch.ones(scores.shape[-2:], **options).tril()
        return scores.masked_fill(~seen, -torch.inf), None
    if attn_mask is None:
        return scores, None
    if attn_mask.dtype == torch.bool:
        unseeing = ~attn_mask.any(-1, keepdim=True)
        return scores.masked_fill(~(attn_mask | unseeing), -torch.inf), unseeing
    unseeing = attn_mask.isneginf().all(-1, keepdim=True)
    return scores + attn_mask.to(scores.dtype).masked_fill(unseeing, 0), unseeing
