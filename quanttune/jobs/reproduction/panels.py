"""What was measured beside what was published, as plain data."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from .cells import FLOAT, Cell
from .published import MARKS, Figure, published
from .tables import Table
from .ways import QUANTTUNE, TUNED, Way, ways_of

AVERAGE = "glue"
UNASSIGNED = "unassigned"
# a row of its own: for each width and seed the alpha that is best on the rows held out
CHOSEN = Way(QUANTTUNE, "QuantTune", QUANTTUNE)
LOST = Way(UNASSIGNED, "OMSE, min-max or percentile", scheme=None)

Values = Mapping[tuple[str, int], Sequence[float]]  # of a row and a width, one per seed


def panels_of(table: Table, cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Return a panel for each model, task and metric, with rows of figures; and GLUE's average.

    A figure has mean, deviation over the seeds (None for one), how many seeds, the published one,
    its mark and source, the difference; or why it is refused.
    """
    ways = _ways_in(table, cells)
    bits = sorted({cell.key.bits for cell in cells} - {FLOAT}, reverse=True)
    by_place: dict[tuple[str, str], list[Cell]] = defaultdict(list)
    for cell in cells:
        by_place[cell.key.model, cell.key.task].append(cell)
    found = []
    averaged: dict[str, list[Values]] = defaultdict(list)
    for (model, task), some in by_place.items():
        for metric in table.tasks[task].metrics:
            values, alphas = _values(some, metric)
            averaged[model].append(values)
            label = f"{table.tasks[task].label}, {metric.replace('_', ' ')}"
            refused = {c.key.way: c.refused for c in some if c.refused}
            panel = _panel(table, model, task, label, ways, bits, values)
            found.append({**panel, "refused": refused, "alphas": alphas})
    for model, tasks in averaged.items():
        if table.name == "table4" and len(tasks) == len(table.tasks):
            panel = _panel(table, model, AVERAGE, "mean of nine", ways, bits, _mean(tasks))
            found.append({**panel, "refused": {}, "alphas": {}})
    return found


def _ways_in(table: Table, cells: Sequence[Cell]) -> list[Way]:
    """Return the rows that cells are of, in the table's order, and that of chosen alphas."""
    names = {cell.key.way for cell in cells}
    alphas = sorted(float(n.removeprefix(TUNED)) for n in names if n.startswith(TUNED))
    found = [way for way in ways_of(table.ways, alphas) if way.name in names]
    return [*found, CHOSEN] if alphas else found


def _values(cells: Sequence[Cell], metric: str) -> tuple[Values, dict[str, list[str]]]:
    """Return what was measured by row and width, and which alphas were chosen by width."""
    values: dict[tuple[str, int], list[float]] = defaultdict(list)
    tuned: dict[tuple[int, int], list[Cell]] = defaultdict(list)
    for cell in sorted(cells, key=lambda cell: cell.key.seed):
        if cell.refused:
            continue
        values[cell.key.way, cell.key.bits].append(cell.values[metric])
        if cell.held_out:
            tuned[cell.key.bits, cell.key.seed].append(cell)
    alphas: dict[str, list[str]] = defaultdict(list)
    for (bits, _), some in tuned.items():
        best = max(some, key=lambda cell: cell.held_out[metric])
        values[QUANTTUNE, bits].append(best.values[metric])
        alphas[place_of(bits)].append(best.key.way.removeprefix(TUNED))
    return values, dict(alphas)


def _mean(tasks: Sequence[Values]) -> Values:
    """Return the mean over tasks, seed by seed, where each has as many."""
    places = set.intersection(*({*values} for values in tasks))
    counts = {place: {len(values[place]) for values in tasks} for place in places}
    return {
        place: [fmean(some) for some in zip(*(values[place] for values in tasks), strict=True)]
        for place in places
        if len(counts[place]) == 1
    }


def _panel(
    table: Table,
    model: str,
    task: str,
    label: str,
    ways: Sequence[Way],
    bits: Sequence[int],
    values: Values,
) -> dict[str, Any]:
    places = [FLOAT, *bits]
    there = {
        (row, width): figure
        for (name, of, at, row, width), figure in published().items()
        if (name, of, at) == (table.name, model, task)
    }
    lost = [LOST] if any(row == UNASSIGNED and width in bits for row, width in there) else []
    rows = [
        {
            "name": way.name,
            "label": way.label,
            "figures": {
                place_of(place): _figure(
                    values.get((way.name, place), ()), there.get((way.row, place))
                )
                for place in places
            },
        }
        for way in (*ways, *lost)
    ]
    return {
        "model": model,
        "task": task,
        "label": f"{table.models[model].label}: {label}",
        "rows": rows,
    }


def _figure(seeds: Sequence[float], figure: Figure | None) -> dict[str, Any]:
    mean = fmean(seeds) if seeds else None
    value = figure.value if figure else None
    return {
        "mean": mean,
        "deviation": stdev(seeds) if len(seeds) > 1 else None,
        "seeds": len(seeds),
        "published": str(figure) if figure else "",
        "certainty": figure.certainty if figure else None,
        "source": figure.source if figure else None,
        "difference": None if mean is None or value is None else mean - value,
    }


def place_of(bits: int) -> str:
    return "float" if bits == FLOAT else f"W{bits}A{bits}"


def legend(panels: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what the marks of the figures in panels say."""
    figures = [f for panel in panels for row in panel["rows"] for f in row["figures"].values()]
    kinds = {figure["certainty"] for figure in figures}
    return [f"{mark}: {said}" for kind, (mark, said) in MARKS.items() if mark and kind in kinds]
