"""Fixtures for the tests that run the Triton kernels."""

import importlib

import numpy as np
import pytest
from interpreted import HAS_GPU
from scripts import need_triton_interpreter

from quanttune import reference

definition = importlib.import_module("quanttune.reference.outlier_statistics")


@pytest.fixture(autouse=True)
def _need_an_interpreter(request):
    if not HAS_GPU and "interpreter" in request.module.__name__:
        need_triton_interpreter()


@pytest.fixture(autouse=True)
def _let_numpy_meet_nan():
    """NumPy, which is the interpreter, warns of arithmetic with NaN and inf; a GPU does not."""
    with np.errstate(all="ignore"):
        yield


@pytest.fixture
def small_sample(monkeypatch):
    """Let small rows have strata of several elements."""
    # the launchers read it of the package, the reference of the file that defines it
    for module in (reference, definition):
        monkeypatch.setattr(module, "SAMPLE_SIZE", 512)
