"""What the tensors of a forward are made of, so that activations are told from constants.

Sizes cannot tell: a table of positions has the shape of a batch of one, and so has a mask. So,
while ranges are calibrated, every operation's result is marked by what its arguments are.
"""

from collections.abc import Callable, Iterable
from enum import Flag, auto
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary


class Made(Flag):
    """What a tensor depends on, and what it still is behind views and elementwise operations."""

    OF_INPUTS = auto()
    OF_WEIGHTS = auto()
    SCORE = auto()  # a product that may go into a softmax
    PROBABILITY = auto()  # what a softmax returned
    ROUNDED = auto()  # a weight, on its grid


CONSTANT = Made(0)  # a buffer, or what a function made of numbers
ACTIVATION = Made.OF_INPUTS | Made.OF_WEIGHTS
_ROLES = Made.SCORE | Made.PROBABILITY

_SOFTMAX = {torch.softmax, Tensor.softmax, F.softmax, torch.special.softmax}
# they mix channels or tokens: what they return is another tensor than what they were given
_MIXERS = {
    F.linear, F.conv1d, F.conv2d, F.conv3d, F.layer_norm, F.group_norm, F.batch_norm, F.embedding,
    F.instance_norm, torch.layer_norm, torch.conv1d, torch.conv2d, torch.conv3d, torch.embedding,
    F.multi_head_attention_forward, F.scaled_dot_product_attention, F.bilinear,
    torch.matmul, torch.bmm, torch.mm, Tensor.matmul, Tensor.bmm, Tensor.mm, Tensor.__matmul__,
    Tensor.__rmatmul__, torch.einsum, torch.baddbmm, Tensor.baddbmm, torch.addmm, Tensor.addmm,
}  # fmt: skip
_LOOKUPS = {F.embedding, torch.embedding}
_SELECTIONS = {Tensor.__getitem__, torch.index_select, Tensor.index_select, torch.select,
               Tensor.select, torch.gather, Tensor.gather}  # fmt: skip


class Provenance:
    """Marks what is made in a forward, and tells which sums went into a softmax.

    What it has not seen being made (it came out of a compiled or scripted function, or of a cache)
    counts as an activation.
    """

    def __init__(
        self, inputs: Any, buffers: Iterable[Tensor], rounded: Iterable[Tensor] = ()
    ) -> None:
        self._marks = WeakTensorKeyDictionary()
        # of a tensor: what is to be called once it goes into a softmax
        self._sums = WeakTensorKeyDictionary()
        for x in tensors_in(inputs):
            self._marks[x] = Made.OF_INPUTS
        for x in buffers:
            self._marks[x] = CONSTANT
        for x in rounded:  # parameters that their modules round
            self._marks[x] = Made.OF_WEIGHTS | Made.ROUNDED

    def of(self, x: Tensor) -> Made:
        """Return what a tensor is made of."""
        known: Made | None = self._marks.get(x)
        if known is not None:
            return known
        return Made.OF_WEIGHTS if isinstance(x, nn.Parameter) else ACTIVATION

    def is_residual(self, a: Tensor, b: Tensor) -> bool:
        """Tell whether a sum of two tensors is one of activations, and none of scores."""
        ours, theirs = self.of(a), self.of(b)
        if not (Made.OF_INPUTS in ours & theirs and Made.OF_WEIGHTS in ours | theirs):
            return False
        if ours & theirs & _ROLES:
            return False
        return all(ACTIVATION in mark for mark in (ours, theirs)) or not (ours | theirs) & _ROLES

    def is_product(self, a: Tensor, b: Tensor) -> bool:
        """Tell whether two tensors that are multiplied are activations."""
        ours, theirs = self.of(a), self.of(b)
        return Made.OF_INPUTS in ours & theirs and Made.OF_WEIGHTS in ours | theirs

    def weight_among(self, a: Tensor, b: Tensor) -> int | None:
        """Return which of two tensors is a weight, made of parameters alone, for the other."""
        for which, (weight, x) in enumerate(((a, b), (b, a))):
            if self.of(weight) & ACTIVATION == Made.OF_WEIGHTS and Made.OF_INPUTS in self.of(x):
                return which
        return None

    def mark(self, x: Tensor, made: Made) -> None:
        self._marks[x] = made

    def expect(self, x: Tensor, went_into_softmax: Callable[[], None]) -> None:
        """Call `went_into_softmax` once x does, if it does."""
        self._sums[x] = (*self._sums.get(x, ()), went_into_softmax)

    def enter_softmax(self, x: Any) -> None:
        """Tell the sums that x is made of."""
        for tell in self._sums.get(x, ()) if isinstance(x, Tensor) else ():
            tell()

    def follow(self, func: Callable[..., Any], args: Any, kwargs: Any, result: Any) -> None:
        """Mark the results of an operation."""
        if func in _SOFTMAX:
            self.enter_softmax(args[0] if args else kwargs.get("input"))
        made, sums = self._through(func, args, kwargs)
        for x in tensors_in(result):
            self._marks[x] = made
            if sums:
                self._sums[x] = sums

    def _through(self, func: Any, args: Any, kwargs: Any) -> tuple[Made, tuple[Any, ...]]:
        inputs = list(tensors_in((args, kwargs)))
        marks = [self.of(x) for x in inputs]
        made = CONSTANT
        for mark in marks:
            made |= mark
        if func in _SELECTIONS and self._takes_matrices(inputs):
            return marks[0], ()
        if func in _SOFTMAX:
            return made & ACTIVATION | Made.PROBABILITY, ()
        if func in _LOOKUPS:  # positions are tokens' too, whoever counts them
            return ACTIVATION, ()
        if func in _MIXERS:
            return made & ACTIVATION, ()
        others = [mark for mark in marks if not mark & _ROLES]
        if any(ACTIVATION in mark for mark in others):  # then it is weighted by them, or gated
            made &= ACTIVATION
        sums = tuple(dict.fromkeys(s for x in inputs for s in self._sums.get(x, ())))
        return made, sums

    def _takes_matrices(self, inputs: list[Tensor]) -> bool:
        """Tell whether experts are chosen from a stack; rows of a table are looked up."""
        return (
            bool(inputs)
            and inputs[0].dim() > 2
            and self.of(inputs[0]) & ACTIVATION == Made.OF_WEIGHTS
        )


def tensors_in(values: Any) -> Iterable[Tensor]:
    """Return the tensors in arguments or results."""
    if isinstance(values, Tensor):
        return (values,)
    return (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor))
