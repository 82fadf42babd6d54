"""`auto`: one call that chooses how to quantize a model for a target."""

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from ..masks import Mask
from ..progress import Progress, silent
from ..quantization.prefixes.kept_prefix import prefix_of
from ..quantization.prefixes.prefix import prefix as keep_prefix
from ..quantization.running import evaluating
from ..quantization.state import refuse_quantized
from ..transaction import gradients_as_before
from .judge import PARTS, Judge, parts_of
from .recipe import Builder, Recipe
from .search import NO_BETTER, Clock, Search, Trial
from .space import Point, Space
from .spared import ranked_sites, spare
from .targets import Target, target_of

Evaluate = Callable[[nn.Module, range], float]
Tell = Callable[[Trial, Recipe | None], None]

FLOAT: Point = {"model": "float"}  # the trial of the model as it is


@dataclass(frozen=True)
class Step:
    """A recipe that was the best when it was measured, and its value on the validation rows."""

    recipe: Recipe
    value: float
    seconds: float  # of the search until then


@dataclass(frozen=True)
class Choice:
    """What `auto` chose.

    Args:
        model: quantized. recipe: how; `Builder(...).make(recipe)` makes the same again.
        value, exact: on the validation rows, of the model and of the float model.
        allowed: how much worse the value may be. met: whether it is not.
        ended: why the search did.
        steps: the best ones on the way. tried: all trials, with their recipes.
    """

    model: nn.Module = field(repr=False)
    recipe: Recipe
    value: float
    exact: float
    allowed: float
    met: bool
    ended: str
    steps: list[Step] = field(repr=False)
    tried: list[tuple[Recipe, Trial]] = field(repr=False)


@gradients_as_before()
def auto(
    model: nn.Module,
    *,
    target: str | Target,
    data: Iterable[Any],
    evaluate: Evaluate,
    rows: int,
    drop: str | float | None = "1%",
    less_is_better: bool = False,
    minutes: float = 20.0,
    widths: Mapping[str, Any] | None = None,
    refit_data: Iterable[Any] | None = None,
    mask: Mask | None = "attention_mask",
    known: Sequence[Trial] = (),
    tell: Tell = lambda trial, best: None,
    progress: Progress = silent,
) -> Choice:
    """Choose how to quantize a float model for a target, and return the model that comes of it.

    It climbs from what was good elsewhere, one choice at a time (calibrator, kept prefix, methods,
    refit), and measures each candidate on an eighth of the rows after the other, no further than
    until it is clearly behind the best. It ends when the drop is met by more than the noise of the
    rows, when nothing improves, or when the time is up; Ctrl-C ends it, too, with the best so far.
    Where nothing else meets the drop, tensors that hurt stay in float, if the target allows it.
    Nothing is trained. `model` stays as it is.

    Args:
        target: a name in quanttune.choosing.targets.TARGETS, or a `Target`.
        data: batches for ranges and methods, as of `quantize`: rows that `evaluate` does not see.
        evaluate: called with a quantized model and a range of the validation rows; returns the
            metric on them. Of the value on all rows the mean over the parts is taken.
        rows: how many validation rows there are, 8 or more.
        drop: how much of the float model's value may be lost, "1%" of it or an amount such as 0.5.
            None asks for the best there is: the search goes on until nothing improves.
        less_is_better: such as of a perplexity.
        minutes: for the search. What is under way is stopped.
        widths: bits and weight_bits of `quantize`; 8 by default.
        refit_data: batches that a refit learns from, some tens of thousands of tokens; `data` by
            default.
        mask: which tokens are padding, as in `attach`.
        known: trials of an earlier run on the same rows, which are not measured again.
        tell: is given each new trial, and its recipe if it is the best so far.
        progress: as of `quantize`.

    Raises:
        ValueError: an argument does not fit, the model is quantized or cannot be in the plainest
            way, or there was no time for one candidate.
    """
    chosen = target_of(target, (widths or {}).get("bits", 8))
    parts, batches = parts_of(rows), list(data)
    refuse_quantized(model)
    clock = Clock(60 * minutes)

    def told(what: str, done: int, total: int | None) -> None:
        progress(what, done, total)
        clock.check()

    def score(candidate: nn.Module, part: int) -> float:
        progress("measuring", part, len(parts))
        with torch.no_grad(), evaluating(candidate):
            return float(evaluate(candidate, parts[part]))

    learning = batches if refit_data is None else list(refit_data)
    builder = Builder(model, batches, learning, mask, told)
    space = Space(chosen, _prefix_for(model, batches), widths)
    exact = _exact(partial(score, model), known, clock, tell)
    search = Search(
        Judge(parts, exact, drop, less_is_better),
        lambda point: builder.make(space.recipe(point)),
        score,
        clock=clock,
        known=known,
        tell=lambda trial, best: tell(trial, space.recipe(trial.point) if best else None),
    )
    stages = [lambda search: search.climb(space.starts(), space.axes)]
    if chosen.spares:
        stages.append(partial(_last_resort, space=space, builder=builder))
    ended = search.run(*stages)
    clock.release()
    return _choice(search, space, builder, ended)


def _exact(
    score: Callable[[int], float], known: Sequence[Trial], clock: Clock, tell: Tell
) -> list[float]:
    """Return the float model's values on the parts of the rows."""
    for trial in known:
        if trial.point == FLOAT:
            clock.spend(trial.seconds)
            return trial.values
    trial = Trial(FLOAT, [score(part) for part in range(PARTS)], clock.running)
    clock.spend(trial.seconds)
    tell(trial, None)
    return trial.values


def _prefix_for(model: nn.Module, batches: Sequence[Any]) -> list[int]:
    """Return the tokens that the data ask for in front; none if the model can keep no prefix."""
    try:
        kept: Any = prefix_of(keep_prefix(copy.deepcopy(model), data=batches))
    except ValueError:
        return []
    ids: list[int] = kept.tokens.tolist()
    return ids


def _last_resort(search: Search, space: Space, builder: Builder) -> str:
    best: Any = search.best
    if search.judge.is_met(best.values) or not math.isfinite(search.judge.allowed):
        return NO_BETTER
    quantized = builder.make(space.recipe(best.point))
    ranked = ranked_sites(quantized, builder.data[0], builder.progress)
    return spare(search, best.point, ranked)


def _choice(search: Search, space: Space, builder: Builder, ended: str) -> Choice:
    best: Any = search.best
    judge, recipe = search.judge, space.recipe(best.point)
    ends = accumulate(trial.seconds for trial in search.trials)
    seconds = {id(trial): end for trial, end in zip(search.trials, ends, strict=True)}
    return Choice(
        builder.make(recipe),
        recipe,
        judge.mean(best.values),
        judge.mean(judge.exact),
        judge.allowed,
        judge.is_met(best.values),
        ended,
        [
            Step(space.recipe(step.point), judge.mean(step.values), seconds[id(step)])
            for step in search.steps
        ],
        [(space.recipe(trial.point), trial) for trial in search.trials],
    )
