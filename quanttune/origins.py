"""Which sequence of a call a tensor comes from, and so whose padding is in it.

Sizes do not tell: a decoder may be as long as the encoder, an image as a text. While a call is
followed, a TorchFunctionMode hands what it knows of a tensor on to what is computed of it.
"""

import sys
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from .masks import Handed, counts_of, holds_tokens

# (module, prefix): the mask "prefix"attention_mask that a module, by its name, is called with;
# (None, part, ...): sequences next to each other, of each its source, or its length without one
Source = tuple[Any, ...]

_PRODUCTS = {
    torch.matmul, torch.bmm, torch.mm, torch.einsum, torch.baddbmm, torch.addmm,
    Tensor.matmul, Tensor.bmm, Tensor.mm, Tensor.__matmul__, Tensor.baddbmm, Tensor.addmm,
}  # fmt: skip
_AFTER_A_SUM = {torch.baddbmm, torch.addmm, Tensor.baddbmm, Tensor.addmm}
_JOINS = {torch.cat, torch.concat, torch.concatenate}
_CALL = nn.Module._call_impl.__code__
_ATTENTION = ("scaled_dot_product_attention", "flex_attention", "multi_head_attention_forward")


class Stack:
    """A sequence of tokens; `counts`, bool (samples, tokens), tells padding. None: all count."""

    def __init__(
        self, source: Source, counts: Tensor | None, parts: "Iterable[Stack]" = ()
    ) -> None:
        self.source, self.counts, self.parts = source, counts, tuple(parts)

    def of(self, x: Tensor) -> "Stack | None":
        """Return the sequence whose tokens x holds: this, or a part that was cut out of it."""
        if self.counts is None or holds_tokens(x, self.counts.shape):
            return self
        return next((found for part in self.parts if (found := part.of(x))), None)


class Scores:
    """What attention's scores are made of: rows are queries, columns are keys."""

    def __init__(self, queries: Stack | None, keys: Stack | None) -> None:
        self.queries, self.keys = queries, keys


class Origins(TorchFunctionMode):
    """Follows a call: what is computed of a tensor comes from where its rows come from.

    module: what is called, for a follower that hooks start and stop: they do not run where an
    interrupt ends the call. What is computed after that is not followed.
    """

    def __init__(self, module: nn.Module | None = None) -> None:
        super().__init__()
        self._module = module
        self._of = WeakTensorKeyDictionary()

    def find(self, x: Tensor) -> Stack | Scores | None:
        return self._of.get(x)  # type: ignore[no-any-return]

    def tag(self, x: Tensor, origin: Stack | Scores | None) -> None:
        if origin is not None:
            self._of[x] = origin

    def stop(self) -> None:
        """Follow no more, if this is what follows; after an interrupt it may be something else."""
        if _get_current_function_mode() is self:
            self.__exit__(None, None, None)

    def receive(self, name: str, handed: Iterable[Handed]) -> None:
        """Note the masks that a module (by name; "" is the model) is called with."""
        for prefix, mask, sequences in handed:
            known = None if mask is None else self.find(mask)
            if mask is None:
                # so that what comes of it is known by the time that a call gives a mask
                new = [x for x in sequences if self.find(x) is None]
                stack = Stack((name, prefix), None)
            else:
                counts = counts_of(mask)
                if isinstance(known, Stack) and _same(known.counts, counts):
                    continue  # handed on from module to module
                new, stack = sequences, Stack((name, prefix), counts)
                self.tag(mask, stack)
            for x in new:
                self.tag(x, stack)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._module is not None and not _is_called(self._module):
            return result
        if func is Tensor.__setitem__ and isinstance(args[2], Tensor) and not self.find(args[0]):
            self.tag(args[0], self.find(args[2]))
        if type(result) is not torch.Size:
            made = [result] if isinstance(result, Tensor) else result
            if isinstance(made, (tuple, list)):
                made = [x for x in made if isinstance(x, Tensor) and x.dim()]
                if made and any(self.find(x) is None for x in made):
                    origin = self._origin(func, args, kwargs or {}, made[0])
                    for x in made:
                        if self.find(x) is None:
                            self.tag(x, origin)
        return result

    def _origin(
        self, func: Callable[..., Any], args: Any, kwargs: Any, result: Tensor
    ) -> Stack | Scores | None:
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if func in _PRODUCTS and len(tensors) > 1:
            left, right = tensors[1:3] if func in _AFTER_A_SUM else tensors[:2]
            return self._of_product(self.find(left), self.find(right))
        if getattr(func, "__name__", "") in _ATTENTION:
            return self.find(tensors[0])
        if func in _JOINS:
            axis = args[1] if len(args) > 1 else kwargs.get("dim", 0)
            if axis in (1, 1 - result.dim()) and (joined := self._joined(tensors, result)):
                return joined
        found = [(x, origin) for x in tensors if (origin := self.find(x))]
        like = [origin for x, origin in found if x.shape[:2] == result.shape[:2]]
        likely = like or [origin for _, origin in found]
        return next((o for o in likely if isinstance(o, Scores)), likely[0] if likely else None)

    def _of_product(
        self, left: Stack | Scores | None, right: Stack | Scores | None
    ) -> Stack | Scores | None:
        if isinstance(left, Scores):
            return left.queries
        if isinstance(right, Scores):  # transposed, from the right
            return right.queries
        return left if right is None else Scores(left, right)

    def _joined(self, tensors: list[Tensor], result: Tensor) -> Stack | None:
        """Return the sequence that has others next to each other, such as a class token first."""
        batch = result.shape[0]
        tensors = [x for x in tensors if x.dim() > 1]  # caches begin with one that has none
        origins = [self.find(x) for x in tensors]
        parts = [origin for origin in origins if isinstance(origin, Stack)]
        source: list[Any] = []
        counts: list[Tensor] = []
        for x, origin in zip(tensors, origins, strict=True):
            if isinstance(origin, Stack) and not _fits(origin, x):
                return None
            known = isinstance(origin, Stack)
            source.append(origin.source if known else x.shape[1])  # type: ignore[union-attr]
            seen = origin.counts if known else None  # type: ignore[union-attr]
            counts.append(x.new_ones(batch, x.shape[1], dtype=torch.bool) if seen is None else seen)
        if not parts:
            return None
        return Stack((None, *source), torch.cat(counts, 1), parts)


def _is_called(module: nn.Module) -> bool:
    """Tell whether a call of a module is under way in this thread."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _CALL and frame.f_locals["self"] is module:
            return True
        frame = frame.f_back
    return False


def _fits(stack: Stack, x: Tensor) -> bool:
    return stack.counts is None or x.shape[:2] == stack.counts.shape


def _same(one: Tensor | None, other: Tensor) -> bool:
    return one is not None and one.shape == other.shape and torch.equal(one, other)
