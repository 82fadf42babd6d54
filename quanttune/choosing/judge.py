"""Is one model better than another? Paired differences on parts of the validation rows."""

import math
from collections.abc import Sequence
from itertools import pairwise
from statistics import NormalDist, stdev

PARTS = 8
RUNGS = (2, 4, PARTS)  # parts after which a candidate that is behind goes no further
BEHIND = 2.0  # standard errors
RISK = 0.05  # that a drop which seems to be met is not, of all candidates together


def parts_of(rows: int) -> list[range]:
    """Return ranges of rows, as equal as can be.

    Raises:
        ValueError: there are too few.
    """
    if rows < PARTS:
        raise ValueError(f"the choice needs {PARTS} validation rows or more, got {rows}")
    ends = [rows * i // PARTS for i in range(PARTS + 1)]
    return [range(a, b) for a, b in pairwise(ends)]


def mean_of(values: Sequence[float], parts: Sequence[range]) -> float:
    """Return the mean over the parts that were measured, by their rows."""
    rows = [len(part) for part in parts[: len(values)]]
    return sum(v * n for v, n in zip(values, rows, strict=True)) / sum(rows)


def allowed_drop(drop: str | float | None, value: float) -> float:
    """Return how far a metric may fall: "1%" is of the float model's value, a number is its unit's.
    With None nothing is good enough.

    Raises:
        ValueError: it is neither, or below 0.
    """
    if drop is None:
        return -math.inf
    text = str(drop).strip()
    try:
        number = float(text.removesuffix("%"))
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f'drop must be such as "1%" or 0.5, of 0 or more, got {drop!r}')
    return abs(value) * number / 100 if text.endswith("%") else number


class Judge:
    """Compares candidates with the float model and with each other.

    Args:
        parts: ranges of rows; exact: the float model's values on them.
        drop: how much may be lost, as `allowed_drop` takes it.
    """

    def __init__(
        self,
        parts: Sequence[range],
        exact: Sequence[float],
        drop: str | float | None,
        less_is_better: bool = False,
    ) -> None:
        self._parts = parts
        self._sign = -1 if less_is_better else 1
        self.exact = exact
        self.allowed = allowed_drop(drop, self.mean(exact))

    def mean(self, values: Sequence[float]) -> float:
        """Return the mean over the parts that were measured."""
        return mean_of(values, self._parts)

    def lost(self, values: Sequence[float]) -> float:
        """Return how much worse than the float model a candidate is; infinite if not a number."""
        return self._behind(values, self.exact)[0]

    def is_hopeless(self, values: Sequence[float], best: Sequence[float] | None) -> bool:
        """Tell whether a candidate is behind the best by more than the noise of the rows, and not
        good enough as it is.
        """
        if not all(map(math.isfinite, values)):
            return True
        if best is None or not all(map(math.isfinite, best)):
            return False
        mean, error = self._behind(values, best)
        return mean > BEHIND * error and not self.is_met(values)

    def is_better(self, values: Sequence[float], best: Sequence[float] | None) -> bool:
        """Tell whether a candidate is ahead of the best by more than a standard error."""
        if best is None or not all(map(math.isfinite, best)):
            return True
        mean, error = self._behind(values, best)
        return mean < -error

    def is_met(self, values: Sequence[float]) -> bool:
        """Tell whether the loss is within what is allowed, on these rows."""
        return self.lost(values) <= self.allowed

    def is_surely_met(self, values: Sequence[float], tried: int = 1) -> bool:
        """Tell whether it would be on others, too, as far as the noise of these tells.

        tried: candidates so far, of which one is the luckiest (Bonferroni's correction).
        """
        mean, error = self._behind(values, self.exact)
        return mean + NormalDist().inv_cdf(1 - RISK / tried) * error <= self.allowed

    def _behind(self, values: Sequence[float], others: Sequence[float]) -> tuple[float, float]:
        """Return how much worse values are than others, and the standard error of that."""
        pairs = zip(values, others, strict=False)
        differences = [self._sign * (other - value) for value, other in pairs]
        if not all(map(math.isfinite, differences)):
            return math.inf, math.inf
        return self.mean(differences), stdev(differences) / math.sqrt(len(differences))
