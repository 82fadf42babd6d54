"""Time calls against each other in turns, so that a slow spell of the machine hits them all."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter
from typing import Any

from torch import Tensor

from .onnx_model import OnnxModel

LEAST = 7  # samples of each call
SHORTEST = 50e-3  # seconds of one sample: a shorter call is repeated within it
Calls = Mapping[str, Callable[[], Any]]


@dataclass(frozen=True)
class Timing:
    """What a call takes, over all rounds."""

    milliseconds: float  # the median
    quartiles: tuple[float, float]  # milliseconds
    speed: float  # times the first call's; the median of the rounds' ratios


def compare(
    files: Mapping[str, Path], batch: Mapping[str, Tensor], threads: int, seconds: float
) -> dict[str, Timing]:
    """Time ONNX files in turns, as `in_turns` does, and set each beside the first.

    Args:
        batch: what each is called with.
        threads: of one operator.
    """
    models = {name: OnnxModel(path, threads=threads) for name, path in files.items()}
    return summarize(in_turns({n: partial(m, **batch) for n, m in models.items()}, seconds))


def in_turns(calls: Calls, seconds: float, shortest: float = SHORTEST) -> dict[str, list[float]]:
    """Return the seconds that each call took, a value per round.

    The calls take turns (A B A B ...) until `seconds` are over and each has LEAST samples. Each
    runs twice before that. With shortest=0 a turn is one call, which finds in the caches what the
    other call left there.
    """
    repeats = {name: _repeats(call, shortest) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    end = perf_counter() + seconds
    rounds = 0
    while rounds < LEAST or perf_counter() < end:
        for name, call in calls.items():
            samples[name].append(_time(call, repeats[name]) / repeats[name])
        rounds += 1
    return samples


def summarize(samples: Mapping[str, list[float]]) -> dict[str, Timing]:
    """Return what `in_turns` measured as medians, quartiles and ratios to the first call."""
    first = next(iter(samples.values()))
    return {name: _timing(times, first) for name, times in samples.items()}


def _timing(times: list[float], first: list[float]) -> Timing:
    low, middle, high = (1e3 * t for t in quantiles(times, n=4, method="inclusive"))
    # of one round: a slow spell that lasts for both cancels out
    speed = median(rival / time for rival, time in zip(first, times, strict=True))
    return Timing(middle, (low, high), speed)


def _repeats(call: Callable[[], Any], shortest: float) -> int:
    call()
    return max(1, int(shortest / _time(call, 1)))


def _time(call: Callable[[], Any], repeats: int) -> float:
    start = perf_counter()
    for _ in range(repeats):
        call()
    return perf_counter() - start
