"""Reports: results files in, one page of HTML out."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import write_json, write_text
from .analysis_sections import analysis_sections
from .auto_sections import auto_sections
from .demo_sections import demo_sections, mean_ranges
from .page import Section, render
from .plots import draw_ranges
from .reproduction_sections import reproduction_sections
from .results_table import DIGITS as DIGITS


def write(results: Any, folder: Path) -> list[Path]:
    """Write results.json, ranges.png and report.html of a demo, and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    data = results.as_dict()
    figure = folder / "ranges.png"
    draw_ranges(mean_ranges(data), "inputs of LayerNorm").savefig(figure, dpi=150)
    return [*write_report(data, folder, "results.json"), figure]


def write_report(data: Mapping[str, Any], folder: Path, name: str) -> list[Path]:
    """Write numbers as JSON and the page that shows them, and return both paths.

    The numbers come last: where they are, the page is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    numbers, page = folder / name, folder / "report.html"
    write_text(page, build([data]))
    write_json(numbers, data)
    return [numbers, page]


def build(files: Sequence[Mapping[str, Any]]) -> str:
    """Return one page for what demos, analyses, choices and tables have written, in order.

    Raises:
        ValueError: a file holds none of them.
    """
    parts = [_sections(data) for data in files]
    names = [data[_subject(data)] for data in files]
    title = f"quanttune: {', '.join(dict.fromkeys(names))}"
    return render(title, [section for sections in parts for section in sections])


def read(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Return the contents of results files."""
    files = []
    for path in paths:
        try:
            files.append(json.loads(path.read_text(encoding="utf-8")))
            _subject(files[-1])
        except ValueError as error:
            raise ValueError(f"{path} is no results file of quanttune: {error}") from error
    return files


def _sections(data: Mapping[str, Any]) -> list[Section]:
    sections, _ = _KINDS[_subject(data)]
    return sections(data)


def _subject(data: Any) -> str:
    """Return under which name a file says what it is of, which tells its kind."""
    if isinstance(data, Mapping):
        for subject, (_, others) in _KINDS.items():
            if {subject, *others} <= data.keys():
                return subject
    raise ValueError(
        "wanted results.json of a demo or a table, analysis.json of an analysis, or auto.json"
    )


# where a file says what it is of: its sections, and what else it holds
_KINDS: dict[str, tuple[Callable[[Mapping[str, Any]], list[Section]], set[str]]] = {
    "task": (
        demo_sections,
        {"metric", "caveats", "recipe", "environment", "seconds", "rows", "ranges"},
    ),
    "analysis": (
        analysis_sections,
        {"metric", "sweep", "calibrators", "models", "sites", "errors"},
    ),
    "auto": (
        auto_sections,
        {"target", "metric", "values", "verdict", "file", "recipe", "steps", "tried"},
    ),
    "reproduction": (
        reproduction_sections,
        {"title", "panels", "notes", "request", "rows", "environment"},
    ),
}
