"""What tests run elsewhere: scripts with a Python of their own, kernels in Triton's interpreter."""

import subprocess
import sys

import numpy as np
import pytest


def run(script, folder):
    """Run a script in a process of its own, whose working directory holds no quanttune."""
    command = [sys.executable, "-W", "error", "-c", script]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def need_triton_interpreter():
    """Skip the test where Triton's interpreter cannot run: that of 3.6 needs an older NumPy."""
    triton = pytest.importorskip("triton")
    old = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)
    if old and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        pytest.skip("the interpreter of Triton 3.6 needs another NumPy: pip install 'numpy<2.4'")
