"""The memory of a step, as the resident set of its process. Linux only."""

from collections.abc import Callable
from pathlib import Path

CURRENT, PEAK = "VmRSS:", "VmHWM:"  # unlike ru_maxrss a process does not inherit the peak


def resident(field: str) -> float:
    """Return a field of the process's status, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def peak_of(step: Callable[[], object]) -> float:
    """Return the peak in a step, in MiB.

    Raises:
        RuntimeError: what came before has taken more.
    """
    loaded = resident(PEAK)
    step()
    peak = resident(PEAK)
    if peak <= loaded:
        raise RuntimeError(f"the step stays below the {loaded:.0f} MiB that loading took")
    return peak
