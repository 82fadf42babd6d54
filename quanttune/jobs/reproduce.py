"""Measure a table of the paper again, cell by cell. What `quanttune reproduce` does."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..environment import environment
from ..files import write_text
from ..progress import Progress, silent
from ..report.report import write_report
from ..report.reproduction_sections import markdown
from .reproduction.cells import Bench, Cell, keys_of
from .reproduction.figures import reproduce_figures
from .reproduction.folder import check_folder, opened
from .reproduction.panels import legend, panels_of, place_of
from .reproduction.request import Request, Selection, bench_of
from .reproduction.tables import TABLES, Model, Table, Task
from .reproduction.ways import Way

FIGURES = "figures"
RESULTS, PAGE = "results.json", "table.md"
RANDOM = "The weights are random: the figures say that the command runs, and nothing else."
TRIAL = (
    "A trial: --limit {} takes no more rows of any part, an eighth of them calibrate, and searches "
    "try 5 scales in place of 100, in one turn, on one batch."
)

Say = Callable[[str], None]


def reproduce(
    request: Request,
    selection: Selection,
    out: Path,
    *,
    resume: bool = False,
    dry_run: bool = False,
    say: Say = print,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Measure cells of a table of the paper, put them beside the published ones, and return all.

    Of "figures" it is what `quanttune.jobs.reproduction.figures` has.

    A cell that is done is a line of metrics.jsonl, so that a run that was killed goes on with the
    next. results.json, table.md and report.html are of all cells that the folder has, which may be
    of several selections.

    Args:
        resume: go on with what is in `out`, or add to it.
        dry_run: read the data of all models and tasks, and stop.

    Raises:
        ValueError: an argument, the data or the folder does not fit; it says what would.
    """
    if request.table == FIGURES:
        return reproduce_figures(
            request, selection, out, resume=resume, dry_run=dry_run, say=say, progress=progress
        )
    table = TABLES[request.table]
    places = list(product(selection.models_of(table), selection.tasks_of(table)))
    ways = selection.ways_of(table)
    if dry_run:
        check_folder(out, request, resume)
        return _tried(request, selection, table, places, ways, say)
    with opened(out, request, resume) as folder:
        known = [Cell.from_dict(line) for line in folder.lines()]
        for model, task in places:
            done = {cell.key for cell in known}
            keys = keys_of(model.name, task.name, ways, selection.bits, selection.seeds)
            if left := [key for key in keys if key not in done]:
                bench = bench_of(request, selection, table, model, task, out, say)
                _check_known(known, bench, model, task, out)
                for cell in bench.measured(left, {way.name: way for way in ways}, progress):
                    folder.append(cell.as_dict())
                    known.append(cell)
                    say(_line(table, ways, cell))
        results = _results(request, table, known)
        write_report(results, out, RESULTS)
        write_text(out / PAGE, markdown(results))
    return results


def _tried(
    request: Request,
    selection: Selection,
    table: Table,
    places: Iterable[tuple[Model, Task]],
    ways: Sequence[Way],
    say: Say,
) -> dict[str, Any]:
    """Read all that a run would, and return how many cells it has."""
    count = 0
    with TemporaryDirectory() as folder:
        for model, task in places:
            bench = bench_of(request, selection, table, model, task, Path(folder), say)
            cells = len(keys_of(model.name, task.name, ways, selection.bits, selection.seeds))
            inputs, count = bench.inputs, count + cells
            say(
                f"{model.label}, {task.label}: {len(inputs.measured.rows)} rows to measure, "
                f"{len(inputs.learning.rows)} to learn from, {cells} cells"
            )
    return {"cells": count}


def _check_known(known: Iterable[Cell], bench: Bench, model: Model, task: Task, out: Path) -> None:
    """Refuse rows, or weights, that are not those of the cells that are there."""
    for cell in known:
        same = (cell.key.model, cell.key.task) == (model.name, task.name)
        if same and cell.of != bench.inputs.fingerprint:
            raise ValueError(
                f"{out} has figures of {model.label} on {task.label} of other rows or weights: "
                "give those again, or choose another --out"
            )


def _line(table: Table, ways: Sequence[Way], cell: Cell) -> str:
    """Return a line about a cell: what was measured, and what was published."""
    key = cell.key
    way = next(way for way in ways if way.name == key.way)
    model, task = table.models[key.model].label, table.tasks[key.task].label
    seed = f", seed {key.seed}" if key.seed else ""
    head = f"{model}, {task}: {way.label}, {place_of(key.bits)}{seed}"
    if cell.refused:
        return f"{head}: left out, {cell.refused}"
    figures = ", ".join(f"{name} {value:.2f}" for name, value in cell.values.items())
    return f"{head}: {figures} ({cell.seconds:.0f} s)"


def _results(request: Request, table: Table, cells: Sequence[Cell]) -> dict[str, Any]:
    panels = panels_of(table, cells)
    notes = [*legend(panels), *table.notes]
    notes += [RANDOM] if request.random_weights else []
    notes += [TRIAL.format(request.limit)] if request.limit else []
    return {
        "reproduction": table.name,
        "title": table.title,
        "request": asdict(request),
        "rows": {f"{c.key.model}, {c.key.task}": c.rows for c in cells if c.rows},
        "panels": panels,
        "notes": notes,
        "cells": [cell.as_dict() for cell in cells],
        "environment": environment(),
    }
