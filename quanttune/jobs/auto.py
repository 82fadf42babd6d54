"""Choose how to quantize a model for a target, and deliver it. What `quanttune auto` does."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from ..choosing.auto import Choice
from ..choosing.auto import auto as choose
from ..choosing.judge import mean_of, parts_of
from ..choosing.recipe import Builder, Recipe
from ..choosing.search import Trial
from ..choosing.targets import target_of
from ..files import write_json
from ..progress import Progress, silent
from .auto_rows import Request, Rows, evaluation, first_rows, load_parts
from .checkpoints import read_object
from .delivery import finish
from .metrics import METRICS
from .publication import held
from .run_folder import RunFolder
from .settings import Settings

RECIPE = "recipe.json"


def auto(
    settings: Settings,
    request: Request,
    out: Path,
    *,
    minutes: float = 20.0,
    resume: bool = False,
    dry_run: bool = False,
    say: Callable[[str], None] = print,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Choose a recipe on validation rows, write model, file and page to `out`, and say what for.

    Trials go to metrics.jsonl as they are done, and the best recipe to recipe.json, so that a run
    that was killed goes on. An interruption (KeyboardInterrupt of `progress`) ends the search, and
    what is best so far is delivered.

    Args:
        minutes: for the search; loading, export and test are besides.
        resume: go on with what is in `out`.
        dry_run: read the data, and stop.

    Raises:
        ValueError: an argument, the data or the folder does not fit; it says what would.
    """
    target, folder = target_of(request.target, request.bits), RunFolder(out)
    config = {"settings": settings.as_json(), "request": asdict(request)}
    folder.check(config, resume)
    parts = _loaded(settings, request, say)
    numbers = parts_of(len(parts.validation.rows))
    if dry_run:
        return parts.facts
    with held(out):
        folder.check(config, resume)  # another process may have been at work in between
        known = [Trial(**line) for line in folder.lines()] if folder.is_begun else []
        if not folder.is_begun:
            folder.begin(config)
        facts = {**config, **parts.facts}

        def tell(trial: Trial, best: Recipe | None) -> None:
            folder.append(asdict(trial))
            if best:
                write_json(out / RECIPE, {**facts, "recipe": best.as_dict()})
                say(f"{request.metric} {mean_of(trial.values, numbers):.6g}: {best}")

        model = parts.learning.load_float(settings.seed)
        data, refit_data = _batches(settings, request, parts, model)
        choice = choose(
            model,
            target=target,
            data=data,
            refit_data=refit_data,
            evaluate=evaluation(settings, parts.validation, request.metric),
            rows=len(parts.validation.rows),
            drop=request.drop,
            less_is_better=METRICS[request.metric].less_is_better,
            minutes=minutes,
            widths=request.widths,
            known=known,
            tell=tell,
            progress=progress,
        )
        write_json(out / RECIPE, {**facts, "recipe": choice.recipe.as_dict()})
        say(f"{choice.ended}: {choice.recipe}")
        models = {"float": model, "quantized": choice.model}
        return finish(settings, request, parts, folder, models, _facts(choice, numbers))


def repeat(
    recipe: Path,
    out: Path,
    *,
    say: Callable[[str], None] = print,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Do what a recipe.json says, without a search: the same bits, on the same data and machine.

    Raises:
        ValueError: the file is none, or the folder holds something.
    """
    told, folder = read_object(recipe), RunFolder(out)
    try:
        settings = Settings(**{**told["settings"], "text": tuple(told["settings"]["text"])})
        request, chosen = Request(**told["request"]), Recipe(**told["recipe"])
        prints = told["data"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{recipe} is no recipe of quanttune auto: {error}") from error
    config = {"settings": told["settings"], "request": told["request"], "recipe": told["recipe"]}
    folder.check(config, resume=False)
    parts = _loaded(settings, request, say)
    if parts.facts["data"] != prints:
        say("the data are others than those that the recipe was chosen on")
    with held(out):
        folder.check(config, resume=False)
        folder.begin(config)
        model = parts.learning.load_float(settings.seed)
        data, refit_data = _batches(settings, request, parts, model)
        quantized = Builder(model, data, refit_data, progress=progress).make(chosen)
        write_json(out / RECIPE, {**config, **parts.facts})
        models = {"float": model, "quantized": quantized}
        found = {"recipe": chosen.as_dict(), "ended": "", "steps": [], "tried": []}
        return finish(settings, request, parts, folder, models, found)


def _loaded(settings: Settings, request: Request, say: Callable[[str], None]) -> Rows:
    parts = load_parts(settings, request)
    for line in parts.validation.said:
        say(line)
    counts = ", ".join(f"{count} {name}" for name, count in parts.facts["rows"].items())
    say(f"rows: {counts}")
    return parts


def _batches(
    settings: Settings, request: Request, parts: Rows, model: nn.Module
) -> tuple[list[Any], list[Any]]:
    """Return the batches for ranges and methods, and those for a refit."""
    counts = request.limit, request.refit_rows
    some = (first_rows(parts.learning, count).batches(settings, model) for count in counts)
    data, refit_data = map(list, some)
    return data, refit_data


def _facts(choice: Choice, parts: Sequence[range]) -> dict[str, Any]:
    """Return how a search went, as plain data."""
    return {
        "recipe": choice.recipe.as_dict(),
        "ended": choice.ended,
        "steps": [
            {"recipe": str(step.recipe), "value": step.value, "seconds": step.seconds}
            for step in choice.steps
        ],
        "tried": [
            {
                "recipe": str(recipe),
                "value": mean_of(trial.values, parts) if trial.values else None,
                "parts": len(trial.values),
                "seconds": trial.seconds,
                "refused": trial.refused,
            }
            for recipe, trial in choice.tried
        ],
    }
