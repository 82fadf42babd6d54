"""Tables of the pages that are made from results."""

from collections.abc import Iterable, Sequence


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], numbers: int | None = None) -> str:
    """Return a table in Markdown; so many columns after the first are numbers, by default all."""
    count = len(heads) - 1 if numbers is None else numbers
    rules = ["---:" if 0 < i <= count else "---" for i in range(len(heads))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, rules, *rows))
