"""Climb from several starts, one choice at a time, on as few rows as tell."""

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from .judge import RUNGS, Judge
from .space import Axes, Choice, Point, neighbours

SURELY_MET, NO_BETTER = "the drop is met", "no single choice improves it further"
NO_TIME, INTERRUPTED = "the time is up", "interrupted"


class OutOfTime(Exception):
    """Raised where a search is told how far it has come, when its time is up."""


@dataclass
class Trial:
    """What was measured of a candidate.

    values: of parts of the rows; fewer than all where it fell behind. refused: why there is none.
    """

    point: Point
    values: list[float] = field(default_factory=list)
    seconds: float = 0.0
    refused: str = ""

    @property
    def is_complete(self) -> bool:
        return len(self.values) == RUNGS[-1]


class Clock:
    """The time that a search may take: that of its trials, of an earlier run too, and of now."""

    def __init__(self, seconds: float) -> None:
        self._left = seconds
        self._began = time.monotonic()

    def spend(self, seconds: float) -> None:
        """Count what a trial took, and begin the next one."""
        self._left -= seconds
        self._began = time.monotonic()

    def check(self) -> None:
        """Raise OutOfTime if none is left."""
        if time.monotonic() - self._began > self._left:
            raise OutOfTime

    def release(self) -> None:
        """Let what comes now take as long as it takes."""
        self._left = math.inf

    @property
    def running(self) -> float:
        return time.monotonic() - self._began


class Search:
    """Looks for the best point of a space; what it does depends on what it measures alone.

    Args:
        make: makes the model of a point; a ValueError says that it cannot be.
        score: measures a model on a part of the rows, by its number.
        known: trials of an earlier run, which are not measured again.
        tell: is given each new trial, and whether it is the best so far.
    """

    def __init__(
        self,
        judge: Judge,
        make: Callable[[Point], Any],
        score: Callable[[Any, int], float],
        *,
        clock: Clock,
        known: Iterable[Trial] = (),
        tell: Callable[[Trial, bool], None] = lambda trial, is_best: None,
    ) -> None:
        self.judge, self.clock = judge, clock
        self.trials: list[Trial] = []
        self.steps: list[Trial] = []  # each the best when it was measured
        self._make, self._score, self._tell = make, score, tell
        self._known = {key_of(trial.point): trial for trial in known}
        self._seen: dict[str, Trial] = {}

    @property
    def best(self) -> Trial | None:
        return self.steps[-1] if self.steps else None

    @property
    def _best_values(self) -> list[float] | None:
        return self.best.values if self.best else None

    def run(self, *stages: Callable[["Search"], str]) -> str:
        """Go through stages until one has met the drop, and return what ended the last one.

        Raises:
            ValueError: the first point cannot be made, or there was no time for one.
        """
        found = NO_BETTER
        try:
            for stage in stages:
                found = stage(self)
                if found == SURELY_MET:
                    break
        except OutOfTime:
            found = NO_TIME
            if self.best is None:
                raise ValueError(
                    "the time was up before one way to quantize was measured: give more minutes"
                ) from None
        except KeyboardInterrupt:
            found = INTERRUPTED
            if self.best is None:
                raise
        return found

    def climb(self, starts: Sequence[Point], axes: Axes) -> str:
        """Try the starts, then neighbours of the best until none is better; return why it ended.

        All starts are tried: what runs as fast may as well lose less than the drop.
        """
        for count, point in enumerate(self._proposals(starts, axes), 1):
            self.attempt(point)
            if count >= len(starts) and self.best and self.is_surely_met(self.best):
                return SURELY_MET
        return NO_BETTER

    def attempt(self, point: Point) -> Trial:
        """Return the trial of a point, which is measured if nobody has yet."""
        key = key_of(point)
        if key in self._seen:
            return self._seen[key]
        is_new = key not in self._known
        if is_new:
            trial = self._measured(point)
        else:
            trial = replace(self._known[key], point=point)  # a file has lists for tuples
            self.clock.spend(trial.seconds)
        self._seen[key] = trial
        self.trials.append(trial)
        is_best = trial.is_complete and self.judge.is_better(trial.values, self._best_values)
        if is_best:
            self.steps.append(trial)
        if is_new:
            self._tell(trial, is_best)
        return trial

    def is_surely_met(self, trial: Trial) -> bool:
        """Tell whether a trial meets the drop by more than the noise of the rows."""
        return trial.is_complete and self.judge.is_surely_met(trial.values, len(self.trials))

    def take(self, point: Point) -> None:
        """Let a point that was measured be the best, though another one may have lost less."""
        self.steps.append(self._seen[key_of(point)])

    def _measured(self, point: Point) -> Trial:
        self.clock.check()
        trial = Trial(point)
        try:
            model = self._make(point)
        except ValueError as error:
            if not self.trials:
                raise
            trial.refused = str(error)
        else:
            self._race(model, trial)
        trial.seconds = self.clock.running
        self.clock.spend(trial.seconds)
        return trial

    def _race(self, model: Any, trial: Trial) -> None:
        """Measure part after part, up to all or to where the model is clearly behind the best."""
        before = self._best_values
        for rung in RUNGS:
            for part in range(len(trial.values), rung):
                self.clock.check()
                trial.values.append(self._score(model, part))
            if before is not None and self.judge.is_hopeless(trial.values, before[:rung]):
                return

    def _proposals(self, starts: Sequence[Point], axes: Axes) -> Iterator[Point]:
        yield from starts
        poor: set[Choice] = set()  # clearly behind an earlier best, or refused: tried last
        moved: Choice | None = ("", "")
        while moved and (best := self.best):
            choices = neighbours(best.point, axes, after=moved[0])
            moved = None
            for choice in sorted(choices, key=poor.__contains__):
                point = choices[choice]
                yield point
                if self.best is not best:
                    moved = choice
                    break
                if not self._seen[key_of(point)].is_complete:
                    poor.add(choice)


def key_of(point: Mapping[str, Any]) -> str:
    return json.dumps(point, sort_keys=True)
