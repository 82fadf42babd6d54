"""Results as a table: a row per way to quantize, a column per arm, means over the seeds."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import isnan, nan
from statistics import mean, stdev
from typing import Any

DIGITS = {  # of a metric, behind the point
    "cosine": 3,
    "accuracy": 1,
    "perplexity": 2,
    "word error rate": 1,
}
LESS_IS_BETTER = {"perplexity", "word error rate"}
USUAL_COVERAGE = "full_no_softmax"  # what older results are of, too


@dataclass(frozen=True)
class Way:
    """A way to quantize: bits, calibrator, granularity of weights."""

    bits: int
    calibrator: str
    weights: str
    coverage: str = USUAL_COVERAGE

    @property
    def group(self) -> str:
        if self.calibrator == "none":
            return "not quantized"
        coverage = f", coverage {self._coverage}" if self._coverage else ""
        return f"{self.calibrator}, weights per {self.weights}{coverage}"

    @property
    def short(self) -> str:
        if self.calibrator == "none":
            return ""
        weights = "" if self.weights == "channel" else f" /{self.weights}"
        return f"{self.calibrator}{weights} {self._coverage}".strip()

    @property
    def _coverage(self) -> str:
        return "" if self.coverage == USUAL_COVERAGE else self.coverage

    @property
    def label(self) -> str:
        return "fp32" if self.calibrator == "none" else f"W{self.bits}A{self.bits}"


@dataclass(frozen=True)
class Cell:
    mean: float
    deviation: float | None  # over the seeds; None for a single one
    best: bool  # of its row

    def text(self, digits: int, spread: bool = True) -> str:
        if isnan(self.mean):
            return "-"
        deviation = "" if self.deviation is None else f" ±{self.deviation:.{digits}f}"
        return f"{self.mean:.{digits}f}{deviation if spread else ''}"


@dataclass(frozen=True)
class Table:
    arms: list[str]
    cells: dict[Way, list[Cell]]  # in the order of the arms


def tabulate(rows: Iterable[Any]) -> Table:
    """Arrange rows, as of `experiment.Row`, in the order they come in."""
    values: dict[Way, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    rows = list(rows)
    for row in rows:
        coverage = getattr(row, "coverage", USUAL_COVERAGE)
        way = Way(row.bits, row.calibrator, row.weights, coverage)
        values[way][row.arm].append(row.value)
    arms = list(dict.fromkeys(arm for by_arm in values.values() for arm in by_arm))
    best = min if rows and rows[0].metric in LESS_IS_BETTER else max
    cells = {way: cells_of([by_arm[arm] for arm in arms], best) for way, by_arm in values.items()}
    return Table(arms, cells)


def cells_of(values: list[list[float]], best_of: Callable[..., float] = max) -> list[Cell]:
    """Return the cells of what was measured with several seeds; one of them at least has values."""
    means = [mean(seeds) if seeds else nan for seeds in values]  # nan: not measured
    best = best_of(value for value in means if not isnan(value))
    deviations = [stdev(seeds) if len(seeds) > 1 else None for seeds in values]
    return [Cell(m, deviation, m == best) for m, deviation in zip(means, deviations, strict=True)]
