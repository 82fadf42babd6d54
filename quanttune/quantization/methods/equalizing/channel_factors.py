"""What equalizations share: ranges of channels, and factors that norms are divided by."""

from abc import abstractmethod
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ....progress import track
from ...running import Data, forward_batches
from ...scheme import Scheme
from ...token_mask import inside
from ..method import Equalization
from .pairs import Pair
from .readers import find_pairs

SMALLEST = 1e-5  # factor of a channel, as in SmoothQuant


@dataclass
class Channels:
    """The ranges of the channels that a pair's readers read, over all batches, padding left out.

    low, high: float32 or wider, (channels,). rows: (at most `most`, channels), evenly from all
    that were seen.
    """

    most: int
    low: Tensor = field(default_factory=lambda: torch.tensor(torch.inf))
    high: Tensor = field(default_factory=lambda: torch.tensor(-torch.inf))
    rows: Tensor = field(default_factory=lambda: torch.empty(0))
    _stride: int = 1

    @property
    def absmax(self) -> Tensor:
        return torch.maximum(-self.low, self.high)

    def see(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        """See one batch; a forward pre-hook of a reader."""
        x = args[0]
        counted = inside(x, "input")
        rows = x.flatten(0, -2) if counted is None else x[counted.expand_as(x)[..., 0]]
        if len(rows):
            rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
            self.low = torch.minimum(self.low.to(rows), rows.amin(0))
            self.high = torch.maximum(self.high.to(rows), rows.amax(0))
            if self.most:
                self._keep(rows[:: self._stride])

    def _keep(self, rows: Tensor) -> None:
        self.rows = torch.cat([self.rows, rows]) if len(self.rows) else rows
        while len(self.rows) > self.most:
            self.rows, self._stride = self.rows[::2], 2 * self._stride
        self.rows = self.rows.clone()  # not the batch that it is a view of


class ChannelEqualization(Equalization):
    """Divides each channel of a norm's output, and multiplies the weights that read it.

    Where more than Linear modules read it (a residual branch, in BERT), they get what they did:
    see Restoration. Modules that are tied, or read other things as well, are left alone.
    """

    rows = 0  # how many of a pair's inputs `factors` needs

    @abstractmethod
    def factors(self, pair: Pair, channels: Channels, scheme: Scheme) -> tuple[Tensor, Tensor]:
        """Return what each channel is divided by, and what is subtracted before, or zeros."""

    def find(self, model: nn.Module, data: Data) -> Sequence[Any]:
        """Return what is equalized: pairs, or what has their name, readers, columns and fold."""
        return find_pairs(model, data)

    @torch.no_grad()
    def apply(self, model: nn.Module, scheme: Scheme, data: Data) -> None:
        pairs = self.find(model, data)
        seen = {pair.name: Channels(self.rows) for pair in pairs}
        with ExitStack() as undo:
            for pair in pairs:
                reader = next(iter(pair.readers.values()))
                handle = reader.register_forward_pre_hook(seen[pair.name].see)
                undo.callback(handle.remove)
            forward_batches(model, data.track(f"{self.name}: ranges"), data.mask)
        for pair in track(pairs, self.name, data.progress):
            channels = seen[pair.name]
            if not channels.absmax.isfinite().all():
                raise ValueError(f"{pair.name} {pair.verb} NaN, inf or nothing during calibration")
            pair.fold(*self.factors(pair, channels, scheme))
