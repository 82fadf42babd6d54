"""How far a long call has come, and who is told."""

from collections.abc import Callable, Iterable, Iterator
from operator import length_hint
from typing import TypeVar

# what is done, how many of it, and of how many; None if nobody knows
Progress = Callable[[str, int, int | None], None]
Item = TypeVar("Item")


def silent(what: str, done: int, total: int | None) -> None:
    """Tell nobody."""


def track(items: Iterable[Item], what: str, progress: Progress) -> Iterator[Item]:
    """Yield items, and tell before each one, and at the end, how many are done."""
    total, done = length_hint(items) or None, 0
    for item in items:
        progress(what, done, total)
        yield item
        done += 1
    progress(what, done, total)
