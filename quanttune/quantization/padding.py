"""Padding stays out of what calibrators and analyses see."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn

from ..masks import Mask, Masks, holds_tokens

ATTENTION = frozenset({"operand", "score", "probability"})  # kinds whose tokens come after heads

# bool (samples, tokens), in the forward that is under way; None if all count, or nobody knows
_counts: ContextVar[Tensor | None] = ContextVar("counts", default=None)


def arguments_of(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return what a model is called with: a tensor, a mapping of keywords, or (inputs, ...)."""
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (batch[0] if isinstance(batch, (tuple, list)) else batch,), {}


@contextmanager
def counting(
    model: nn.Module, batch: Any, mask: Mask | None = "attention_mask"
) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Yield the arguments of a call with a batch, whose padding `inside` knows meanwhile."""
    args, kwargs = arguments_of(batch)
    counts = Masks(model, mask).read(args, kwargs)
    token = _counts.set(None if counts is None or counts.all() else counts)
    try:
        yield args, kwargs
    finally:
        _counts.reset(token)


def inside(x: Tensor, kind: str) -> Tensor | None:
    """Tell which elements of an activation are no padding.

    kind: one of coverage's. Scores and probabilities of attention count where query and key do.

    Returns:
        bool, of a shape that broadcasts to that of x; None if all count, or x has other rows.
    """
    counts = _counts.get()
    if counts is None or x.dim() == 0:
        return None
    counts = counts.to(x.device)
    if kind in ATTENTION:
        return _inside_attention(x, counts, kind)
    if not holds_tokens(x, counts.shape):
        return None
    return counts[(...,) + (None,) * (x.dim() - 2)] if x.dim() > 2 else counts.flatten()[:, None]


def without_padding(x: Tensor, kind: str) -> Tensor:
    """Return x, or if there is padding in it the other elements as a vector."""
    return select(x, inside(x, kind))


def select(x: Tensor, counted: Tensor | None) -> Tensor:
    """Return x, or the elements that `inside` told as a vector."""
    return x if counted is None else x[counted.expand_as(x)]


def _inside_attention(x: Tensor, counts: Tensor, kind: str) -> Tensor | None:
    """Find the tokens of (samples, heads, tokens, channels), or with samples * heads in one."""
    samples, tokens = counts.shape
    if x.dim() < 3 or x.shape[0] % samples:
        return None
    rows = counts.repeat_interleave(x.shape[0] // samples, 0)
    rows = rows[(slice(None), *(None,) * (x.dim() - 3))]
    queries = rows[..., None] if x.shape[-2] == tokens else None
    keys = rows[..., None, :] if x.shape[-1] == tokens else None
    if queries is None or keys is None:
        return keys if queries is None else queries
    return queries if kind == "operand" else queries & keys
