"""The memory of a step, as the resident set of its process. Linux only.

Of a process that is started with `without_gaps()`: glibc then gives each tensor pages of its own
and takes them back at once, so that it is tensors that are counted, and no gaps between them. With
gaps the figure of a step moves by a tenth from one run to the next.
"""

import os
from collections.abc import Callable
from pathlib import Path

CURRENT, PEAK = "VmRSS:", "VmHWM:"  # unlike ru_maxrss a process does not inherit the peak


def without_gaps() -> dict[str, str]:
    """Return an environment in which memory is counted."""
    return {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}


def resident(field: str) -> float:
    """Return a field of the process's status, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def peak_of(step: Callable[[], object]) -> float:
    """Return the peak in a step, in MiB: of what came before it is forgotten."""
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew: man 5 proc
    step()
    return resident(PEAK)


def peak_above(step: Callable[[], object]) -> float:
    """Return the peak in a step above what was resident before it, in MiB."""
    before = resident(CURRENT)
    return peak_of(step) - before
