"""Results as a table: a row per arm, a column per way to quantize, means over the seeds."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any


@dataclass(frozen=True)
class Column:
    """A way to quantize: bits, calibrator, granularity of weights."""

    bits: int
    calibrator: str
    weights: str

    @property
    def group(self) -> str:
        if self.calibrator == "none":
            return ""
        return f"{self.calibrator}, weights per {self.weights}"

    @property
    def label(self) -> str:
        return "fp32" if self.calibrator == "none" else f"W{self.bits}A{self.bits}"


@dataclass(frozen=True)
class Cell:
    mean: float
    deviation: float | None  # over the seeds; None for a single one
    best: bool  # of its column, the fp32 column apart

    def text(self, digits: int) -> str:
        spread = "" if self.deviation is None else f" ±{self.deviation:.{digits}f}"
        return f"{self.mean:.{digits}f}{spread}"


@dataclass(frozen=True)
class Table:
    columns: list[Column]
    cells: dict[str, list[Cell]]  # by arm


def tabulate(rows: Iterable[Any]) -> Table:
    """Arrange rows (seed, arm, bits, calibrator, weights, value) in the order in which they come."""
    values: dict[tuple[str, Column], list[float]] = defaultdict(list)
    for row in rows:
        values[row.arm, Column(row.bits, row.calibrator, row.weights)].append(row.value)
    columns = list(dict.fromkeys(column for _, column in values))
    arms = list(dict.fromkeys(arm for arm, _ in values))
    best = {c: max(mean(values[arm, c]) for arm in arms) for c in columns}
    return Table(
        columns, {arm: [_cell(values[arm, c], c, best[c]) for c in columns] for arm in arms}
    )


def _cell(values: list[float], column: Column, best: float) -> Cell:
    deviation = stdev(values) if len(values) > 1 else None
    return Cell(mean(values), deviation, column.calibrator != "none" and mean(values) == best)
