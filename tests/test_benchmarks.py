"""The benchmarks still run and their answers are right; what is timed here does not matter."""

import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


def test_benchmarks_run_on_their_smallest_shapes():
    command = [sys.executable, "-m", "pytest", str(FOLDER), "-o", "python_files=bench_*.py"]
    command += ["-k", "small", "--benchmark-disable", "-q", "-p", "no:cacheprovider"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout
