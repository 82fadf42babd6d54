"""How an observed tensor is made of samples and of padding."""

from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..masks import Mask, Masks, batch_size, counts_of, holds_tokens
from ..origins import Origins, Scores, Source, Stack
from .hooks import recomputing


class Padding:
    """The tokens of each sample that count.

    Args:
        counts: bool (samples, tokens).
        holes: whether there may be padding between tokens that count. Then they are put next to
            each other before they are observed, which costs two copies.
    """

    def __init__(self, counts: Tensor, holes: bool) -> None:
        self.shape = counts.shape
        counts = counts.to(torch.uint8)
        length = counts.sum(1, dtype=torch.int64)
        begin = torch.zeros_like(length) if holes else counts.argmax(1)
        # of each sample where the first token that counts is, and how many do
        self.ranges = torch.stack([begin, length], 1)
        self.order = counts.argsort(dim=1, descending=True, stable=True) if holes else None
        self._ranges_by_width: dict[tuple[int, torch.device], Tensor] = {}

    def ranges_in(self, x: Tensor) -> Tensor:
        """Return the ranges in elements of x."""
        key = x.numel() // self.shape.numel(), x.device
        if key not in self._ranges_by_width:
            self._ranges_by_width[key] = (self.ranges * key[0]).to(x.device)
        return self._ranges_by_width[key]

    def pack(self, x: Tensor) -> Tensor:
        """Put the tokens that count first, if they are not next to each other."""
        if self.order is None:
            return x
        rows = x.reshape(*self.shape, -1)
        return rows.gather(1, self._index(rows)).reshape(x.shape)

    def unpack(self, x: Tensor) -> Tensor:
        """Put the tokens back to where they were."""
        if self.order is None:
            return x
        rows = x.reshape(*self.shape, -1)
        return torch.zeros_like(rows).scatter(1, self._index(rows), rows).reshape(x.shape)

    def _index(self, rows: Tensor) -> Tensor:
        assert self.order is not None
        return self.order.to(rows.device)[:, :, None].expand(rows.shape)


def has_holes(counts: Tensor) -> bool:
    """Tell whether there is padding between tokens that count."""
    begins = counts[:, :1].sum(1) + (counts[:, 1:] & ~counts[:, :-1]).sum(1)
    return bool((begins > 1).any())


class Layout(NamedTuple):
    """source: of the mask for what x holds, in a call of several sequences."""

    samples: int
    padding: Padding | None
    source: Source | None = None


class Layouts:
    """Tells the layout of tensors in the forward that is under way, or is recomputed.

    Where a call gives one sequence of words, what has its shape has its padding. Else the first
    forward of its kind is followed, to learn which mask is for what each site sees: see origins.py.
    """

    def __init__(self, model: nn.Module, mask: Mask | None) -> None:
        self._model, self._masks = model, Masks(model, mask)
        self._samples = 1
        self._single = True
        self._padding: Padding | None = None  # of a single sequence
        # in a mask, seen in a forward that is not compiled: a trace knows no values
        self._holes = False
        # which mask the n-th tensor of a site belongs to, by the names of the model's arguments
        self._learned: dict[frozenset[str], dict[tuple[str, int], Source | None]] = {}
        self._kind: frozenset[str] = frozenset()
        self._sources: set[Source] = set()
        self._following: Origins | None = None
        # of the forward that is under way
        self._counts: dict[Source, Tensor | None] = {}
        self._paddings: dict[Source, Padding | None] = {}
        self._visits: Counter[str] = Counter()
        self._met: dict[tuple[str, torch.Size], Padding | None] = {}
        # what a recomputation finds, and does not if forwards differ in their padding
        self._known: dict[tuple[str, torch.Size], Layout] = {}
        self._ambiguous: set[tuple[str, torch.Size]] = set()

    @property
    def receivers(self) -> dict[str, nn.Module]:
        """The submodules that may be handed a mask."""
        return self._masks.receivers

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Begin an observed forward with these arguments."""
        self.end()  # of one that was interrupted
        self._samples = batch_size(self._model, args, kwargs)
        self._single = self._masks.is_single(args, kwargs)
        if self._single:
            counts = self._masks.read(args, kwargs)
            self._padding = None if counts is None else self._padding_of(counts)
            return
        self._kind = frozenset(self._masks.given(args, kwargs))
        if self._kind not in self._learned and not torch.compiler.is_compiling():
            self._learned[self._kind] = {}
            self._following = Origins(self._model)
            self._following.__enter__()
        self.receive("", args, kwargs)

    def receive(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the masks that a submodule (by name; "" is the model) is called with."""
        if self._single:
            return
        if self._following:
            self._following.receive(name, self._masks.handed(name, args, kwargs))
        elif any(source[0] == name for source in self._sources):
            for prefix, mask, _ in self._masks.handed(name, args, kwargs):
                source = name, prefix
                if source in self._sources:
                    self._counts[source] = None if mask is None else self._counted(mask)
                    self._paddings.clear()

    def end(self, whole: bool = False) -> None:
        """End a forward, and forget what was learned of one that did not come to its end."""
        if self._following:
            self._following.stop()
            if not whole:
                self._learned.pop(self._kind, None)
        self._padding, self._following, self._single = None, None, True
        self._counts, self._paddings, self._met = {}, {}, {}
        self._visits = Counter()

    def forget(self) -> None:
        """Let the next forward be the first of those that a backward pass belongs to."""
        self._ambiguous.clear()

    def keep(self, x: Tensor, site: str, is_first: bool) -> Layout | None:
        """Return the layout of x, and let recomputations find it.

        is_first: whether this is the first forward of those that a backward pass belongs to. None:
        x is recomputed, but its forward was not observed.
        """
        key = site, x.shape
        if recomputing():
            return self._recomputed(key)
        layout = self.current(x, site)
        self._visits[site] += 1
        self.remember(x, site, layout, is_first)
        return layout

    def remember(self, x: Tensor, site: str, layout: Layout, is_first: bool) -> None:
        """Let recomputations find the layout of x, which another site may have kept.

        A checkpoint that begins at this site gives it a copy of x.
        """
        key = site, x.shape
        before = self._known.get(key, layout).padding
        if before is not layout.padding and (not is_first or key in self._met):
            self._ambiguous.add(key)
        self._known[key] = layout
        self._met[key] = layout.padding

    def current(self, x: Tensor, site: str) -> Layout:
        """Return the layout of x in a forward that is no recomputation."""
        if self._single:
            return self.planned(x, None)
        return self.planned(x, self._source(x, site))

    def planned(self, x: Tensor, source: Source | None) -> Layout:
        """Return the layout of x, which belongs to the mask of that source."""
        # batch-major if the samples divide it; else it is one sample, apart from the batch
        samples = self._samples if x.shape[0] % self._samples == 0 else 1
        padding = self._padding if self._single else self._padding_at(source)
        fits = padding is not None and holds_tokens(x, padding.shape)
        return Layout(samples, padding if fits else None, source)

    def hand_on(self, x: Tensor, y: Tensor) -> None:
        """Note that y, which a tap made of x, holds what x does."""
        if self._following:
            self._following.tag(y, self._following.find(x))

    def _source(self, x: Tensor, site: str) -> Source | None:
        learned = self._learned.get(self._kind, {})
        visit = site, self._visits[site]
        if not self._following:
            if visit not in learned:  # of a layer that was skipped: follow the next forward
                self._learned.pop(self._kind, None)
            return learned.get(visit, learned.get((site, 0)))
        origin = self._following.find(x)
        origin = origin.queries if isinstance(origin, Scores) else origin
        stack = origin.of(x) if origin else None
        learned[visit] = None if stack is None else stack.source
        if stack is not None:
            self._note(stack)
        return learned[visit]

    def _note(self, stack: Stack) -> None:
        """Remember the masks that a sequence has, to look for them in every forward."""
        for part in stack.parts:
            self._note(part)
        self._sources.add(stack.source)
        self._counts[stack.source] = stack.counts

    def _padding_at(self, source: Source | None) -> Padding | None:
        if source is None:
            return None
        if source not in self._paddings:
            counts = self._counts_at(source)
            self._paddings[source] = None if counts is None else self._padding_of(counts)
        return self._paddings[source]

    def _counts_at(self, source: Source) -> Tensor | None:
        """Return a mask of this forward, made of those of its parts if it has any."""
        if source in self._counts or source[0] is not None:
            return self._counts.get(source)
        parts: list[Any] = [
            part if isinstance(part, int) else self._counts_at(part) for part in source[1:]
        ]
        like = next((part for part in parts if isinstance(part, Tensor)), None)
        if like is None or any(part is None for part in parts):
            return None
        return torch.cat(
            [like.new_ones(len(like), p) if isinstance(p, int) else p for p in parts], 1
        )

    def _recomputed(self, key: tuple[str, torch.Size]) -> Layout | None:
        if key in self._ambiguous:
            raise RuntimeError(
                "a checkpoint recomputes one of several forwards that differ in their padding: "
                "combine() and backward() each of them before the next"
            )
        return self._known.get(key)

    def _counted(self, mask: Tensor) -> Tensor:
        return mask != 0 if torch.compiler.is_compiling() else counts_of(mask)

    def _padding_of(self, counts: Tensor) -> Padding | None:
        if torch.compiler.is_compiling():
            return Padding(counts, self._holes)
        if counts.all():
            return None
        holes = has_holes(counts)
        self._holes |= holes
        return Padding(counts, holes)
