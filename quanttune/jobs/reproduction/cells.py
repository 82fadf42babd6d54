"""One figure after the other: a model, a task, a row, a width, a seed."""

import copy
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from torch import nn

from ...progress import Progress
from ...quantization.simulation import quantize
from ..settings import Settings
from .arms import Budget, load_arm, why_not
from .inputs import Batch, Inputs
from .ways import BASE, TUNED, Way

FLOAT = 32


@dataclass(frozen=True)
class Key:
    """Which cell it is; way is the name of a row, and 32 bits are float."""

    model: str
    task: str
    way: str
    bits: int
    seed: int


@dataclass(frozen=True)
class Cell:
    """What was measured.

    Args:
        of: the fingerprint of model and rows.
        values: by metric, of the rows that are measured.
        held_out: the same of rows that alpha is chosen by; of QuantTune's rows alone.
        rows: how many were measured.
        refused: why there is no figure; "" where there is one.
    """

    key: Key
    of: str
    values: dict[str, float] = field(default_factory=dict)
    held_out: dict[str, float] = field(default_factory=dict)
    rows: int = 0
    refused: str = ""
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self.key), **{k: v for k, v in asdict(self).items() if k != "key"}}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Cell":
        names = Key.__dataclass_fields__
        key = Key(**{name: data[name] for name in names})
        return cls(key, **{name: value for name, value in data.items() if name not in names})


def keys_of(
    model: str, task: str, ways: Sequence[Way], bits: Sequence[int], seeds: int
) -> list[Key]:
    """Return the cells of a model and a task, those of an arm behind one another."""
    ordered = sorted(ways, key=lambda way: way.arm != BASE)
    return [
        Key(model, task, way.name, width, seed)
        for seed in range(seeds)
        for way in ordered
        for width in way.widths(bits)
    ]


@dataclass(frozen=True)
class Bench:
    """What the cells of a model and a task share.

    Args:
        settings: of the model and its rows; each cell has its own seed.
        calibration: rows that ranges are taken from.
        short: whether searches are cut short.
        folder: where models that were tuned are kept.
    """

    settings: Settings
    inputs: Inputs
    budget: Budget
    calibration: int
    short: bool
    folder: Path

    def measured(
        self, keys: Iterable[Key], ways: dict[str, Way], progress: Progress
    ) -> Iterator[Cell]:
        """Measure cells; one model is in memory for those of an arm that follow one another."""
        for (seed, arm), some in groupby(keys, lambda key: (key.seed, ways[key.way].arm)):
            yield from self._of_arm(arm, seed, list(some), ways, progress)

    def _of_arm(
        self, arm: str, seed: int, keys: list[Key], ways: dict[str, Way], progress: Progress
    ) -> Iterator[Cell]:
        settings = replace(self.settings, seed=seed)
        if refused := why_not(arm, self.inputs):
            yield from (Cell(key, self.inputs.fingerprint, refused=refused) for key in keys)
            return
        model = load_arm(arm, settings, self.inputs, self.budget, self.folder, progress)
        batches = self.inputs.calibration(settings, model, self.calibration)
        for key in keys:
            yield self._cell(key, ways[key.way], settings, model, batches, progress)

    def _cell(
        self,
        key: Key,
        way: Way,
        settings: Settings,
        model: nn.Module,
        batches: list[Batch],
        progress: Progress,
    ) -> Cell:
        began = time.monotonic()
        if key.bits != FLOAT:
            model = copy.deepcopy(model)
            options = way.options(self.short)
            try:
                quantize(model, key.bits, data=batches, progress=progress, **options)
            except ValueError as error:
                return Cell(key, self.inputs.fingerprint, refused=str(error))
        measure = partial(self.inputs.measure, settings, model, progress=progress)
        held_out = measure(self.inputs.held_out) if key.way.startswith(TUNED) else {}
        values, seconds = measure(self.inputs.measured), time.monotonic() - began
        rows = len(self.inputs.measured.rows)
        return Cell(key, self.inputs.fingerprint, values, held_out, rows, seconds=round(seconds, 1))
