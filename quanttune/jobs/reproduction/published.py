"""The figures of the paper's tables, with what is uncertain about them."""

import csv
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

# how a figure is marked that is not read without doubt, and what the mark says
MARKS = {
    "high": ("", ""),
    "medium": ("~", "read from a garbled table, likely right"),
    "low": ("?", "read from a garbled table, a guess"),
    "other": ("†", "from another paper, which rounded other tensors or in another way"),
    "unreadable": ("", "unreadable"),
}
UNREADABLE = "unreadable"


@dataclass(frozen=True)
class Figure:
    """A published figure as it stands there, in per cent.

    Args:
        certainty: a key of MARKS.
        source: where it stands, and what is odd about it.
    """

    text: str
    certainty: str
    source: str

    @property
    def value(self) -> float | None:
        """The number, if one can be read."""
        return float(self.text) if self.text.strip("-") else None

    def __str__(self) -> str:
        return (self.text or UNREADABLE) + MARKS[self.certainty][0]


@cache
def published() -> dict[tuple[str, str, str, str, int], Figure]:
    """Return the figures by table, model, task, row and bits; 32 bits are float."""
    text = files(__package__).joinpath("published.csv").read_text(encoding="utf-8")
    return {
        (row["table"], row["model"], row["task"], row["row"], int(row["bits"])): Figure(
            row["value"], row["certainty"], row["source"]
        )
        for row in csv.DictReader(text.splitlines())
    }
