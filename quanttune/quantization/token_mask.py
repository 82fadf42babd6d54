"""Padding stays out of what calibrators and analyses see."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ..batches import arguments_of
from ..masks import Mask, Masks, holds_tokens
from ..origins import Origins, Scores, Stack
from .prefixes.kept_prefix import prefix_length

ATTENTION = frozenset({"operand", "score", "probability"})  # kinds whose tokens come after heads

# in the forward that is under way; None if all count, or nobody knows
_padding: ContextVar["Origins | Stack | None"] = ContextVar("padding", default=None)


@contextmanager
def counting(
    model: nn.Module, batch: Any, mask: Mask | None = "attention_mask"
) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Yield the arguments of a call with a batch, whose padding `inside` knows meanwhile."""
    args, kwargs = arguments_of(batch, model)
    masks = Masks(model, mask)
    with ExitStack() as undo:
        known: Origins | Stack | None
        if masks.is_single(args, kwargs):
            counts = masks.read(args, kwargs)
            known = None if counts is None or counts.all() else _sequence(model, counts)
        else:
            known = undo.enter_context(_following(masks, args, kwargs))
        undo.callback(_padding.reset, _padding.set(known))
        yield args, kwargs


@contextmanager
def _following(masks: Masks, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Origins]:
    """Follow what is computed of each sequence of a call, and the masks handed to submodules."""
    origins = Origins()

    def receive(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if _padding.get() is origins:  # not in another thread
                origins.receive(name, masks.handed(name, args, kwargs))

        return hook

    with ExitStack() as undo:
        for name, module in masks.receivers.items():
            handle = module.register_forward_pre_hook(receive(name), with_kwargs=True)
            undo.callback(handle.remove)
        origins.receive("", masks.handed("", args, kwargs))
        with origins:
            yield origins


def _sequence(model: nn.Module, counts: Tensor) -> Stack:
    """Return the only sequence of a call; behind a kept prefix, keys have its tokens before it."""
    tokens = Stack((), counts)
    kept = F.pad(counts, (prefix_length(model), 0), value=True)
    return tokens if kept.shape == counts.shape else Stack((), kept, [tokens])


def inside(x: Tensor, kind: str) -> Tensor | None:
    """Tell which elements of an activation are no padding.

    kind: one of coverage's. Scores and probabilities of attention count where query and key do.

    Returns:
        bool, of a shape that broadcasts to that of x; None if all count, or x has other rows.
    """
    known = _padding.get()
    if known is None or x.dim() == 0:
        return None
    origin = known.find(x) if isinstance(known, Origins) else known
    if kind in ATTENTION:
        if isinstance(origin, Stack) and kind != "operand":
            origin = Scores(origin, origin)
        return _inside_attention(x, origin)
    origin = origin.queries if isinstance(origin, Scores) else origin
    stack = origin.of(x) if origin else None
    if stack is None and isinstance(known, Origins) and x.dim() == 4:
        return _heads_tokens(x, origin, -2)  # turned by a rotary embedding
    if stack is None or stack.counts is None or not holds_tokens(x, stack.counts.shape):
        return None
    counts = stack.counts.to(x.device)
    return counts[(...,) + (None,) * (x.dim() - 2)] if x.dim() > 2 else counts.flatten()[:, None]


def without_padding(x: Tensor, kind: str) -> Tensor:
    """Return x, or if there is padding in it the other elements as a vector."""
    return select(x, inside(x, kind))


def select(x: Tensor, counted: Tensor | None) -> Tensor:
    """Return x, or the elements that `inside` told as a vector."""
    return x if counted is None else x[counted.expand_as(x)]


def _inside_attention(x: Tensor, origin: Stack | Scores | None) -> Tensor | None:
    """Find the tokens of (samples, heads, tokens, channels), or with samples * heads in one."""
    if isinstance(origin, Stack):  # an operand: keys may be transposed
        queries = _heads_tokens(x, origin, -2)
        return _heads_tokens(x, origin, -1) if queries is None else queries
    if origin is None:
        return None
    queries, keys = _heads_tokens(x, origin.queries, -2), _heads_tokens(x, origin.keys, -1)
    if queries is None or keys is None:
        return keys if queries is None else queries
    return queries & keys


def _heads_tokens(x: Tensor, stack: Stack | None, axis: int) -> Tensor | None:
    """Return which tokens count along one of the last two axes, if these are the stack's."""
    if stack is None or stack.counts is None or x.dim() < 3:
        return None
    for part in stack.parts:
        if (found := _heads_tokens(x, part, axis)) is not None:
            return found
    samples, tokens = stack.counts.shape
    if x.shape[axis] != tokens or x.shape[0] % samples:
        return None
    rows = stack.counts.to(x.device).repeat_interleave(x.shape[0] // samples, 0)
    rows = rows[(slice(None), *(None,) * (x.dim() - 3))]
    return rows[..., None] if axis == -2 else rows[..., None, :]
