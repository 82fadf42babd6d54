"""Measure a language model on tasks of lm_eval. What `quanttune evaluate --lm-eval` does."""

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch import nn

from . import models
from .evaluate import beside
from .models import find_model
from .settings import Settings


def evaluate_tasks(
    settings: Settings,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measure a language model on tasks of lm_eval; a quantized one beside itself in float.

    Of the settings the model, the task and the batch size count. Rows are cut, scores are scaled
    and seeds are chosen as lm_eval does; the progress bars are its own.

    Args:
        tasks: names that lm_eval knows, or YAML files that define a task.
        limit: rows of each task, the first ones.

    Raises:
        ValueError: the model generates no text, or there is no such task.
    """
    began = time.monotonic()
    source = find_model(settings)
    if source.task != "text-generation":
        raise ValueError(f"lm_eval measures models of text-generation, got one of {source.task}")
    manager = _manager(tasks)
    tokenizer = models.load_processor(source.name, source.task)
    report: dict[str, Any] = {}

    def measured(name: str, model: nn.Module) -> dict[str, float]:
        say(f"measuring {name}")
        report.update(
            simple_evaluate(
                _wrap(model, tokenizer, settings.batch_size),
                tasks=list(tasks),
                task_manager=manager,
                limit=limit,
                bootstrap_iters=0,
                log_samples=False,
            )
        )
        return _numbers(report["results"])

    results = beside(source, settings.seed, measured)
    counts = {task: count["effective"] for task, count in report["n-samples"].items()}
    return {
        "task": source.task,
        "rows": sum(counts.values()),
        **results,
        "model": source.origin,
        "lm_eval": {
            "version": report["lm_eval_version"],
            "tasks": report["versions"],
            "rows": counts,
            "shots": report["n-shot"],
        },
        "seconds": round(time.monotonic() - began, 1),
    }


def _manager(tasks: Sequence[str]) -> TaskManager:
    """Return what finds the tasks; lm_eval's own are read, which takes long, if one is wanted."""
    names = [task for task in tasks if not Path(task).is_file()]
    manager = TaskManager(include_defaults=bool(names))
    if unknown := [name for name in names if name not in manager.task_index]:
        raise ValueError(
            f"lm_eval knows no task {unknown[0]!r} (lm_eval ls tasks lists them), and "
            "no file is called so"
        )
    return manager


def _wrap(model: nn.Module, tokenizer: Any, batch_size: int) -> HFLM:
    """Return the model as lm_eval wants it."""
    logger = logging.getLogger(HFLM.__module__)
    before = logger.level
    logger.setLevel(logging.ERROR)  # it warns of options that are not used
    try:
        return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    finally:
        logger.setLevel(before)


def _numbers(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Return the metrics of all tasks, as task/metric; lm_eval calls them metric,filter."""
    return {
        f"{task}/{key.removesuffix(',none')}": value
        for task, found in results.items()
        for key, value in found.items()
        if "," in key and "_stderr," not in key
    }
