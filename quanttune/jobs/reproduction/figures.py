"""The paper's figures of models of its tables: what `quanttune analyze` draws, on one page."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from ...analysis.analysis import analyze, units
from ...analysis.subject import Request as Question
from ...analysis.subject import Subject
from ...files import write_json, write_text
from ...progress import Progress
from ...report.report import build
from ..rows import drawn
from .arms import load_arm
from .cells import Bench
from .folder import ANALYSES, check_folder, opened
from .request import Request, Selection, bench_of, table_with
from .tables import Model, Table, Task
from .ways import BASE, CONTROL, QUANTTUNE, Way, ways_of

MODELS = ("vit_base", "deit_tiny", "swin_tiny")  # those of Fig. 3
ALPHA = 0.5
ROWS, MEASURED = 100, 400  # that ranges are taken from, and that quality is measured on
RESULTS, PAGE = "results.json", "report.html"


def reproduce_figures(
    request: Request,
    selection: Selection,
    out: Path,
    *,
    resume: bool,
    dry_run: bool,
    say: Callable[[str], None],
    progress: Progress,
) -> dict[str, Any]:
    """Analyse models beside those that are tuned, control and QuantTune; one page has all.

    A model that is done is a file in `out`/analyses, so that a run goes on with the next.

    Raises:
        ValueError: an argument, the data or the folder does not fit; it says what would.
    """
    selection = replace(selection, models=selection.models or MODELS)
    table = table_with(selection.models)
    task, bits = selection.tasks_of(table)[0], selection.bits[0]
    ways = [way for way in _ways(table, selection) if way.arm != BASE]
    chosen = {"task": task.name, "bits": bits, "ways": [way.name for way in ways]}
    models = selection.models_of(table)
    if dry_run:
        check_folder(out, request, resume, selection=chosen)
        return {"cells": len(models)}
    with opened(out, request, resume, selection=chosen):
        found = []
        for model in models:
            path = out / ANALYSES / f"{model.name}.json"
            if not path.exists():
                bench = bench_of(request, selection, table, model, task, out, say)
                analysis = _analysed(request, bench, model, task, ways, bits, progress)
                path.parent.mkdir(exist_ok=True)
                write_json(path, analysis)
                say(f"{model.label}: done")
            found.append(json.loads(path.read_text(encoding="utf-8")))
        write_text(out / PAGE, build(found))
        write_json(out / RESULTS, {"analyses": found})
    return {"analyses": found}


def _ways(table: Table, selection: Selection) -> list[Way]:
    if selection.methods:
        return selection.ways_of(table)
    return ways_of([CONTROL, QUANTTUNE], selection.alphas or [ALPHA])


def _analysed(
    request: Request,
    bench: Bench,
    model: Model,
    task: Task,
    ways: list[Way],
    bits: int,
    progress: Progress,
) -> dict[str, Any]:
    inputs, settings = bench.inputs, bench.settings
    measured = replace(
        inputs.measured, rows=drawn(inputs.measured.rows, request.limit or MEASURED, settings.seed)
    )

    def loaded(arm: str) -> nn.Module:
        return load_arm(arm, settings, inputs, bench.budget, bench.folder, progress)

    def evaluate(one: nn.Module) -> float:
        values = inputs.measure(settings, one, measured, progress=lambda *_: None)
        return values[task.metrics[0]]

    base = loaded(BASE)
    subject = Subject(
        model.label,
        base,
        inputs.calibration(settings, base, min(bench.calibration, request.calibration or ROWS)),
        f"{task.metrics[0].replace('_', ' ')} (%)",
        evaluate,
        None if inputs.learning.task == "image-classification" else inputs.learning.processor,
        {"task": task.label, "rows": [len(inputs.learning.rows), len(measured.rows)]},
    )
    question, others = Question(bits=bits), {way.label: loaded(way.arm) for way in ways}
    total, done = round(units(question, 1 + len(others))), 0.0

    def advance(description: str, more: float) -> None:
        nonlocal done
        done += more
        progress(description, round(done), total)

    return analyze(subject, question, others, advance)
