"""What many grids lose of a tensor, by the Triton kernel, against the reference.

On a GPU if there is one, else in Triton's interpreter.
"""

import pytest
import torch
from interpreted import DEVICE, DTYPES
from test_range_search import assert_near

from quanttune import triton_kernels
from quanttune.reference import range_search


def check(x, steps, qmin, qmax):
    arguments = x.to(DEVICE), steps.to(DEVICE), qmin, qmax
    actual = triton_kernels.quantization_errors(*arguments)
    assert_near(actual, range_search.quantization_errors(*arguments))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 4095, 4096, 8200])
def test_errors(size, dtype):
    x = torch.randn(size).to(dtype)
    x[size // 2] = 30
    for bounds in ((-128, 127), (-2, 1), (-70, 185)):
        check(x, torch.tensor([1e-30, 0.003, 0.1, 1.0, 1e30]), *bounds)


@pytest.mark.parametrize("count", [1, 90])
def test_any_number_of_candidates(count):
    check(torch.randn(5000), torch.rand(count) / 10 + 0.001, -128, 127)


def test_errors_near_ties():
    """Where a code that is off by one changes the error by far more than a rounding."""
    step = torch.tensor([0.013])
    check(((torch.randint(-120, 120, (5000,)) + 0.5) * 0.013).float(), step, -128, 127)
    check(torch.randn(5000) * 3, torch.tensor([1e-4]), -32768, 32767)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_errors_of_what_is_not_finite(bad):
    x = torch.randn(5000, device=DEVICE)
    x[4999] = bad
    errors = triton_kernels.quantization_errors(x, torch.tensor([0.5, 1.0], device=DEVICE), -8, 7)
    assert not errors.isfinite().any()


def test_what_is_left_to_the_reference():
    steps = torch.tensor([0.1, 0.2], device=DEVICE)
    for x in (torch.randn(50, dtype=torch.float64), torch.empty(0)):
        check(x, steps, -8, 7)
    assert triton_kernels.quantization_errors(
        torch.ones(3, device=DEVICE), steps[:0], -8, 7
    ).shape == (0,)
