"""Compare the arms of a recipe: tune each, quantize it in every way, keep the numbers."""

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Protocol

from torch import nn

from ..environment import environment
from ..losses import OutlierLoss
from ..quantization.calibrators import SEARCHES
from ..quantization.requantization import requantize
from ..quantization.scheme import Scheme
from ..quantization.simulation import quantize
from ..tuning.finishing import BITS
from . import rival
from .residual_ranges import residual_ranges

FLOAT_BITS = 32
COVERAGE = Scheme.coverage


@dataclass(frozen=True)
class Arm:
    """One way to prepare the model. Every arm that trains has the same budget of steps."""

    name: str
    summary: str
    learning_rate: float = 0.0
    alpha: float = 0.0
    loss: str | OutlierLoss = "ratio"
    detach_deviation: bool = False
    observe_every: int = 1
    qat_bits: int | None = None  # fake quantization in the loop
    refit: float | None = None  # the tolerance of a refit before the first step
    finish_steps: int = 0  # the last of the steps, which are rounded
    finish_bits: tuple[int, ...] = BITS
    keeps_prefix: bool = False  # tokens in front, which the calibration rows choose
    methods: tuple[str, ...] = ()  # of `quantize`
    same_as: str | None = None  # an arm whose result this one has by construction


class Recipe(Protocol):
    """A job: its data, its model, its metric. One object per seed."""

    name: str
    metric: str
    caveats: Sequence[str]
    arms: Sequence[Arm]
    bits: Sequence[int]
    ways: Mapping[str, Sequence[str]]  # calibrator -> granularities of weights, if not asked for
    coverages: Sequence[str]
    steps: int

    def __init__(self, seed: int, **options: Any) -> None: ...

    def prepare(self, arm: Arm, on_step: Callable[[], None]) -> nn.Module:
        """Return the float model of an arm, calling `on_step` after each optimizer step."""

    def calibration(self) -> list[Any]:
        """Return the batches that ranges are taken from: tuning rows."""

    def evaluate(self, model: nn.Module) -> float:
        """Return the metric on the test rows."""


@dataclass(frozen=True)
class Row:
    """One number. Float models have bits 32 and calibrator "none"; their weights say nothing."""

    seed: int
    arm: str
    bits: int
    calibrator: str
    weights: str
    metric: str
    value: float
    coverage: str = COVERAGE


@dataclass
class Results:
    """All numbers of a demo, and what is needed to read them."""

    task: str
    metric: str
    caveats: list[str]
    recipe: dict[str, Any]
    environment: dict[str, Any]
    seconds: float = 0.0
    rows: list[Row] = field(default_factory=list)
    # seed -> arm -> LayerNorm -> max|x| of its input
    ranges: dict[int, dict[str, dict[str, float]]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)


class Progress(Protocol):
    def __call__(self, description: str, units: float) -> None:
        """Report that `units` of the work are done, and what comes next."""


def run(
    make: Callable[..., Recipe],
    seeds: int,
    progress: Progress,
    calibrators: Sequence[str] = (),
    **options: Any,
) -> Results:
    """Run every arm of a recipe for seeds 0 .. seeds - 1.

    calibrators: to quantize with; by default those of the recipe, and PyTorch's own dynamic
    quantization beside them. `options` are of the recipe.
    """
    began = time.monotonic()
    results: Results | None = None
    for seed in range(seeds):
        progress(f"seed {seed}: loading", 0)
        recipe = make(seed, **options)
        if results is None:
            results = Results(
                recipe.name,
                recipe.metric,
                [*recipe.caveats, *([rival.CAVEAT] if _has_rival(calibrators) else [])],
                {"steps": recipe.steps, "arms": [asdict(arm) for arm in recipe.arms]},
                environment(),
            )
        _run_seed(recipe, seed, calibrators, results, progress)
    if results is None:
        raise ValueError(f"seeds must be at least 1, got {seeds}")
    results.seconds = round(time.monotonic() - began, 1)
    return results


def units(recipe: Any, seeds: int, calibrators: Sequence[str] = ()) -> float:
    """Return how much work `run` will report: one unit is about one training step."""
    trained = sum(arm.learning_rate > 0 for arm in recipe.arms)
    measured = [arm for arm in recipe.arms if arm.same_as is None]
    evaluations = sum(
        1
        + len(_ways(recipe, arm, calibrators)) * len(recipe.coverages) * len(recipe.bits)
        + _has_rival(calibrators)
        for arm in measured
    )
    return seeds * (trained * recipe.steps + evaluations)


def _ways(recipe: Any, arm: Arm, calibrators: Sequence[str]) -> list[tuple[str, str]]:
    """Return (calibrator, granularity of weights); fake quantization trained with channels only."""
    return [
        (calibrator, weights)
        for calibrator in calibrators or recipe.ways
        for weights in recipe.ways.get(calibrator, ("channel",))
        if weights == "channel" or not arm.qat_bits
    ]


def _has_rival(calibrators: Sequence[str]) -> bool:
    return not calibrators and rival.is_here()


def _run_seed(
    recipe: Recipe, seed: int, calibrators: Sequence[str], results: Results, progress: Progress
) -> None:
    ranges = results.ranges.setdefault(seed, {})
    for arm in recipe.arms:
        if arm.same_as:
            copies = [r for r in results.rows if r.arm == arm.same_as and r.seed == seed]
            results.rows += [Row(**{**asdict(r), "arm": arm.name}) for r in copies]
            ranges[arm.name] = ranges[arm.same_as]
            continue
        model = recipe.prepare(arm, partial(progress, f"seed {seed}: tuning {arm.name}", 1))
        shown = recipe.calibration()[: getattr(recipe, "range_batches", None)]
        ranges[arm.name] = residual_ranges(model, shown)
        results.rows += _measure(recipe, seed, arm, calibrators, model, progress)


def _measure(
    recipe: Recipe,
    seed: int,
    arm: Arm,
    calibrators: Sequence[str],
    model: nn.Module,
    progress: Progress,
) -> list[Row]:
    ways, rows = _ways(recipe, arm, calibrators), []

    def add(
        bits: int, calibrator: str, weights: str, quantized: nn.Module, coverage: str = COVERAGE
    ) -> None:
        value = recipe.evaluate(quantized)
        rows.append(Row(seed, arm.name, bits, calibrator, weights, recipe.metric, value, coverage))
        progress(f"seed {seed}: measuring {arm.name}", 1)

    add(FLOAT_BITS, "none", "channel", model)
    for coverage in recipe.coverages:
        options: dict[str, Any] = {"coverage": coverage, "methods": arm.methods}
        for calibrator, weights, bits, quantized in quantized_in(recipe, ways, model, **options):
            add(bits, calibrator, weights, quantized, coverage)
    if _has_rival(calibrators):
        add(rival.BITS, rival.NAME, "channel", rival.quantized(model))
    return rows


def quantized_in(
    recipe: Recipe, ways: Sequence[tuple[str, str]], model: nn.Module, **options: Any
) -> Iterator[tuple[str, str, int, nn.Module]]:
    """Yield the model in every way and width: one calibration serves all widths, if it can.

    ways: (calibrator, granularity of weights). `options` are of `quantize`.
    """
    quantized, calibrated = model, ""
    for calibrator, weights in ways:
        for bits in recipe.bits:
            if calibrator != calibrated or calibrator in SEARCHES:
                calibrated, options["data"] = calibrator, recipe.calibration()
                quantized = quantize(copy.deepcopy(model), bits, calibrator=calibrator, **options)
            requantize(quantized, bits, weights)
            yield calibrator, weights, bits, quantized
