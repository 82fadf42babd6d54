"""Time calls against each other in turns, so that a slow spell of the machine hits them all."""

from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Any

LEAST = 7  # samples of each call
SHORTEST = 50e-3  # seconds of one sample: a shorter call is repeated within it


def medians(
    calls: dict[str, Callable[[], Any]], seconds: float, shortest: float = SHORTEST
) -> dict[str, float]:
    """Return the median time of each call in milliseconds.

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
    return {name: 1e3 * median(times) for name, times in samples.items()}


def _repeats(call: Callable[[], Any], shortest: float) -> int:
    call()
    return max(1, int(shortest / _time(call, 1)))


def _time(call: Callable[[], Any], repeats: int) -> float:
    start = perf_counter()
    for _ in range(repeats):
        call()
    return perf_counter() - start
