"""How an observed tensor is made of samples and of padding."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..masks import Mask, Masks, batch_size, holds_tokens
from .hooks import recomputing
from .padding import Padding, has_holes


class Layout(NamedTuple):
    samples: int
    padding: Padding | None


class Layouts:
    """Tells the layout of tensors in the forward that is under way, or is recomputed."""

    def __init__(self, model: nn.Module, mask: Mask | None) -> None:
        self._model, self._masks = model, Masks(model, mask)
        self._samples = 1
        self._padding: Padding | None = None
        self._holes = False  # in a mask: seen before torch.compile, which cannot look
        # what a recomputation finds, and does not if forwards differ in their padding
        self._known: dict[torch.Size, Layout] = {}
        self._ambiguous: set[torch.Size] = set()

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Begin an observed forward with these arguments."""
        self._samples = batch_size(self._model, args, kwargs)
        self._padding = self._padding_in(args, kwargs)

    def end(self) -> None:
        self._padding = None

    def forget(self) -> None:
        """Let the next forward be the first of those that a backward pass belongs to."""
        self._ambiguous.clear()

    def keep(self, x: Tensor, is_first: bool) -> Layout | None:
        """Return the layout of x, and let recomputations find it.

        is_first: whether this is the first forward of those that a backward pass belongs to. None:
        x is recomputed, but its forward was not observed.
        """
        if recomputing():
            return self._recomputed(x)
        layout = self.current(x)
        before = self._known.get(x.shape, layout)
        if before.padding is not layout.padding and not is_first:
            self._ambiguous.add(x.shape)
        self._known[x.shape] = layout
        return layout

    def is_padded(self, x: Tensor) -> bool:
        """Tell whether there is padding in x."""
        layout = self._recomputed(x) if recomputing() else self.current(x)
        return layout is not None and layout.padding is not None

    def current(self, x: Tensor) -> Layout:
        """Return the layout of x in a forward that is no recomputation."""
        # batch-major if the samples divide it; else it is one sample, apart from the batch
        samples = self._samples if x.shape[0] % self._samples == 0 else 1
        padding = self._padding
        return Layout(samples, padding if padding and holds_tokens(x, padding.shape) else None)

    def _recomputed(self, x: Tensor) -> Layout | None:
        if x.shape in self._ambiguous:
            raise RuntimeError(
                "a checkpoint recomputes one of several forwards that differ in their padding: "
                "combine() and backward() each of them before the next"
            )
        return self._known.get(x.shape)

    def _padding_in(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Padding | None:
        counts = self._masks.read(args, kwargs)
        if counts is None:
            return None
        if torch.compiler.is_compiling():
            return Padding(counts, self._holes)
        if counts.all():
            return None
        holes = has_holes(counts)
        self._holes |= holes
        return Padding(counts, holes)
