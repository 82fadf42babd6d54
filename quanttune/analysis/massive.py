"""Massive activations: tokens with a value that is far from all others, and what it costs.

They stand where attention puts what it has no use for: at the first token, at delimiters. The word
is from Sun et al., arXiv 2402.17762. They count from 100 up; models have scales of their own, so
here a value is massive beside the medians.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

MEDIANS = 100.0  # of the sample's magnitudes: so many make a value massive
TOKENS = 10.0  # and so many times what is the largest of a token, at the median of the tokens

IdOf = Callable[[int, int], int | None]  # the id of a token, by its sample and position


@dataclass
class Massive:
    """The tokens of a site that hold massive activations, over all of the data.

    below: the largest magnitude of all other tokens. places: (sample, token, channel, value).
    """

    below: float = 0.0
    tokens: int = 0
    places: list[tuple[int, int, int, float]] = field(default_factory=list)

    def update(self, x: Tensor, counted: Tensor, medians: Sequence[float], first: int) -> None:
        """Look at samples (rows, tokens, channels), of which `first` is the number of the first.

        counted: bool (rows, tokens). medians: of the magnitudes of each row.
        """
        largest, channels = x.abs().max(-1)
        for row, (values, real, median) in enumerate(zip(largest, counted, medians, strict=True)):
            if not real.any():
                continue
            floor = max(MEDIANS * median, TOKENS * values[real].median().item())
            massive = real & (values >= floor) if median > 0 else real & False
            rest = values[real & ~massive]
            self.tokens += int(real.sum())
            self.below = max(self.below, rest.max().item() if len(rest) else 0.0)
            for token in massive.nonzero().flatten().tolist():
                place = first + row, token, int(channels[row, token]), values[token].item()
                self.places.append(place)

    def describe(self, median: float, id_of: IdOf) -> dict[str, Any] | None:
        """Return what the report says of them; None where there are none."""
        if not self.places:
            return None
        size = max(value for *_, value in self.places)
        channel, channel_share = commonest([channel for _, _, channel, _ in self.places])
        token, token_share = commonest([token for _, token, _, _ in self.places])
        ids = [id_of(sample, token) for sample, token, *_ in self.places]
        token_id, id_share = commonest(ids)
        return {
            "size": size,
            "median": median,
            "channel": channel,
            "channel_share": channel_share,
            "token": token,
            "token_share": token_share,
            "id": token_id,
            "id_share": id_share,
            "tokens": len(self.places) / self.tokens,
            "below": self.below,
            "range_share": 1 - self.below / size,
        }


def commonest(values: Sequence[Any]) -> tuple[Any, float]:
    """Return what is there most often, and its share."""
    (value, times), *_ = Counter(values).most_common(1)
    return value, times / len(values)
