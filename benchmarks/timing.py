"""Medians of calls that are timed in turns."""

from statistics import median

from quanttune.deploy.latency import SHORTEST, Calls, in_turns


def medians(calls: Calls, seconds: float, shortest: float = SHORTEST) -> dict[str, float]:
    """Return the median time of each call in milliseconds; `in_turns` says how they are taken."""
    samples = in_turns(calls, seconds, shortest)
    return {name: 1e3 * median(times) for name, times in samples.items()}
