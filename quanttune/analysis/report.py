"""One page that shows a demo's numbers, its figure and where they come from."""

import base64
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from ..files import write_json, write_text
from .plots import plot_ranges
from .table import tabulate

DIGITS = {"cosine": 3, "accuracy": 1}


def write(results: Any, folder: Path) -> list[Path]:
    """Write results.json, ranges.png and report.html of a demo, and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    figure = folder / "ranges.png"
    plot_ranges(results.ranges, figure)
    report = folder / "report.html"
    write_text(report, render(results, figure.read_bytes()))
    data = folder / "results.json"
    write_json(data, results.as_dict())
    return [data, figure, report]


def render(results: Any, figure: bytes) -> str:
    """Return the page, with the figure inside it."""
    table = tabulate(results.rows)
    loader = PackageLoader("quanttune", "analysis")
    page = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=False)
    return page.get_template("report.html.jinja").render(
        results=results,
        seeds=len(results.ranges),
        table=table,
        groups=[(name, list(ways)) for name, ways in groupby(table.cells, lambda way: way.group)],
        digits=DIGITS[results.metric],
        image=base64.b64encode(figure).decode(),
        environment=_flat(results.environment),
    )


def _flat(environment: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in environment.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {entry}" for key, entry in value.items() if entry)
        flat[name] = value
    return flat
