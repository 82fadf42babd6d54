"""The memory of a step, as the resident set of its process. Linux only."""

from collections.abc import Callable
from pathlib import Path

CURRENT, PEAK = "VmRSS:", "VmHWM:"  # unlike ru_maxrss a process does not inherit the peak


def resident(field: str) -> float:
    """Return a field of the process's status, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def peak_of(step: Callable[[], object]) -> float:
    """Return the peak in a step, in MiB: of what came before it is forgotten."""
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew: man 5 proc
    step()
    return resident(PEAK)
