"""Where the padding of a batch is in an observed tensor."""

import torch
from torch import Tensor


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
