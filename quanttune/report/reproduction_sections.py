"""A page's sections for a table of the paper that was measured again; and the same as Markdown."""

from collections.abc import Iterator, Sequence

from .page import Row, Section, Table, facts_table
from .words import Data


def reproduction_sections(data: Data) -> list[Section]:
    """Return the sections for what results.json of a reproduction holds."""
    sections = [
        Section(panel["label"], points=_notes(panel), tables=[_table(panel)])
        for panel in data["panels"]
    ]
    facts = {**data["request"], "rows": data["rows"], **data["environment"]}
    return [
        *sections,
        Section("How to read it", data["title"], data["notes"]),
        Section("Settings and environment", tables=[facts_table(facts)]),
    ]


def markdown(data: Data) -> str:
    """Return the tables as a page of Markdown."""
    lines = [f"# {data['title']}"]
    for panel in data["panels"]:
        lines += ["", f"## {panel['label']}", "", *_markdown_table(_table(panel))]
        lines += _list(_notes(panel))
    return "\n".join([*lines, *_list(data["notes"])]) + "\n"


def _table(panel: Data) -> Table:
    """Return the figures of a panel; for each width the one measured, the paper's, the difference.

    A difference is measured minus published.
    """
    widths = list(panel["rows"][0]["figures"])
    heads = (name for width in widths for name in (width, "paper", "difference"))
    return Table(("", *heads, "seeds"), [(None, [tuple(_texts(row)) for row in panel["rows"]])])


def _texts(row: Data) -> Iterator[str]:
    yield row["label"]
    figures = row["figures"].values()
    for figure in figures:
        mean, deviation, difference = (figure[k] for k in ("mean", "deviation", "difference"))
        spread = "" if deviation is None else f" ±{deviation:.2f}"
        yield "" if mean is None else f"{mean:.2f}{spread}"
        yield figure["published"]
        yield "" if difference is None else f"{difference:+.2f}"
    yield str(max(figure["seeds"] for figure in figures) or "")


def _notes(panel: Data) -> list[str]:
    alphas = (f"{', '.join(some)} at {width}" for width, some in panel["alphas"].items())
    chosen = "; ".join(alphas)
    said = [f"QuantTune: alpha chosen on rows held out: {chosen}"] if chosen else []
    return [*said, *(f"{name}: {why}" for name, why in panel["refused"].items())]


def _list(notes: Sequence[str]) -> list[str]:
    return ["", *(f"- {note}" for note in notes)] if notes else []


def _markdown_table(table: Table) -> Iterator[str]:
    ((_, rows),) = table.groups
    sizes = [max(3, *map(len, column)) for column in zip(table.columns, *rows, strict=True)]

    def line(cells: Row) -> str:
        first, *others = zip(cells, sizes, strict=True)
        padded = [first[0].ljust(first[1]), *(text.rjust(size) for text, size in others)]
        return f"| {' | '.join(padded)} |"

    yield line(table.columns)
    yield line(["-" * sizes[0], *("-" * (size - 1) + ":" for size in sizes[1:])])
    yield from map(line, rows)
