"""Reports: results files in, one page of HTML out."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import write_json, write_text
from .analysis_sections import analysis_sections
from .auto_sections import auto_sections
from .demo_sections import demo_sections, mean_ranges
from .page import Section, render
from .plots import draw_ranges
from .results_table import DIGITS as DIGITS


def write(results: Any, folder: Path) -> list[Path]:
    """Write results.json, ranges.png and report.html of a demo, and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    data = results.as_dict()
    figure = folder / "ranges.png"
    draw_ranges(mean_ranges(data), "inputs of LayerNorm").savefig(figure, dpi=150)
    return [*write_report(data, folder, "results.json"), figure]


def write_report(data: Mapping[str, Any], folder: Path, name: str) -> list[Path]:
    """Write numbers as JSON and the page that shows them, and return both paths."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers, page = folder / name, folder / "report.html"
    write_json(numbers, data)
    write_text(page, build([data]))
    return [numbers, page]


def build(files: Sequence[Mapping[str, Any]]) -> str:
    """Return one page for what demos, analyses and choices have written, in the order given.

    Raises:
        ValueError: a file holds none of them.
    """
    parts = [_sections(data) for data in files]
    names = [next(data[name] for name in _NAMES if name in data) for data in files]
    title = f"quanttune: {', '.join(dict.fromkeys(names))}"
    return render(title, [section for sections in parts for section in sections])


def read(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Return the contents of results files."""
    files = []
    for path in paths:
        try:
            files.append(json.loads(path.read_text(encoding="utf-8")))
            _kind(files[-1])
        except ValueError as error:
            raise ValueError(f"{path} is no results file of quanttune: {error}") from error
    return files


def _sections(data: Mapping[str, Any]) -> list[Section]:
    return _SECTIONS[_kind(data)](data)


def _kind(data: Any) -> str:
    if isinstance(data, Mapping):
        for kind, keys in _KEYS.items():
            if keys <= data.keys():
                return kind
    raise ValueError("wanted results.json of a demo, analysis.json of an analysis, or auto.json")


_KEYS = {
    "demo": {"task", "metric", "caveats", "recipe", "environment", "seconds", "rows", "ranges"},
    "analysis": {"analysis", "metric", "sweep", "calibrators", "models", "sites", "errors"},
    "auto": {"auto", "target", "metric", "values", "verdict", "file", "recipe", "steps", "tried"},
}
_SECTIONS = {"demo": demo_sections, "analysis": analysis_sections, "auto": auto_sections}
_NAMES = ("task", "analysis", "auto")  # of a file's subject
