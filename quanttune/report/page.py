"""One page of HTML that needs nothing else: sections of text, tables and figures."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

from .figure import svg

Row = Sequence[str]


class Bold(str):
    """A cell that is set in bold."""


class Text(str):
    """A cell that is set as text: left-aligned, and broken where it is long."""


@dataclass(frozen=True)
class Table:
    """A table; its rows come in groups, with a heading or none."""

    columns: Row
    groups: Sequence[tuple[str | None, Sequence[Row]]]


@dataclass(frozen=True)
class Picture:
    """A figure, and in words what it shows."""

    figure: Figure
    caption: str

    @property
    def source(self) -> str:
        """The figure as a URL. Within an img its ids meet no others of the page."""
        return f"data:image/svg+xml;base64,{base64.b64encode(svg(self.figure)).decode()}"


@dataclass(frozen=True)
class Section:
    """A heading with what stands below it: text, a list, tables, figures, in this order."""

    title: str
    text: str = ""
    points: Sequence[str] = ()
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = field(default=(), repr=False)


def render(title: str, sections: Sequence[Section]) -> str:
    """Return the page."""
    loader = PackageLoader("quanttune", "report")
    page = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    page.tests["bold"] = lambda cell: isinstance(cell, Bold)
    page.tests["text"] = lambda cell: isinstance(cell, Text)
    return page.get_template("page.html.jinja").render(title=title, sections=sections)


def facts_table(facts: Mapping[str, Any]) -> Table:
    """Return a table of names and what they are; what is nested becomes a list of words."""
    return Table(("", ""), [(None, [(name, Text(_flat(v))) for name, v in facts.items()])])


def _flat(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {entry}" for key, entry in value.items() if entry)
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return str(value)
