"""How much memory a call leaves behind."""

import gc
import mmap
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

SANITIZED = "libasan" in os.environ.get("LD_PRELOAD", "")
LINUX = sys.platform == "linux"
linux_memory = pytest.mark.skipif(
    not LINUX or SANITIZED, reason="needs the memory of Linux, without a sanitizer's own"
)


def resident() -> int:
    """Return the bytes of memory that this process occupies."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def growth(call: Callable[[], object], times: int) -> int:
    """Return by how many bytes the memory grows in so many calls, after some others."""
    for _ in range(max(times // 5, 20)):
        call()
    before = resident()
    for _ in range(times):
        call()
    return resident() - before
