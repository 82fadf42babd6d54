"""The gradient of the outlier statistics of the Triton kernels against the reference.

On a GPU if there is one, else in Triton's interpreter.
"""

import pytest
import torch
from interpreted import DEVICE, DTYPES, HAS_GPU, KINDS, assert_same_bits, make_rows

from quanttune import reference, triton_kernels


def backward(module, x, grad, statistics, upstream, exact=False, detach_deviation=False):
    return module.outlier_statistics_backward(
        grad, x, statistics, upstream, exact, detach_deviation
    )


@pytest.mark.parametrize("detach_deviation", [False, True])
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("size", [1, 2, 7, 1025, 2048, 5000])
def test_gradient(size, exact, detach_deviation, small_sample):
    x = make_rows(KINDS, size, torch.float32)
    grad = torch.randn_like(x) * 1e-2
    upstream = torch.randn(len(x), device=DEVICE)
    options = (exact, detach_deviation)
    statistics = reference.outlier_statistics(x, len(x), exact)
    actual = backward(triton_kernels, x, grad, statistics, upstream, *options)
    # the same arithmetic in the same order
    assert torch.equal(actual, backward(reference, x, grad, statistics, upstream, *options))
    # and near the truth
    wide = reference.outlier_statistics(x.double(), len(x), exact)
    truth = backward(reference, x.double(), grad.double(), wide, upstream.double(), *options)
    scale = torch.maximum(truth.abs(), truth.square().mean(1, keepdim=True).sqrt())
    assert ((actual - truth).abs() <= 4e-6 * scale).all()


@pytest.mark.parametrize("unit", [2.0**-62, 2.0**-64, 1e-39])
def test_deviations_whose_square_is_no_number(unit, small_sample):
    x = make_rows(["normal"], 1025, torch.float32)
    x = x / x.std() * unit
    statistics, grad = reference.outlier_statistics(x, 1, False), torch.randn_like(x)
    upstream = torch.ones(1, device=DEVICE)
    actual = backward(triton_kernels, x, grad, statistics, upstream)
    assert torch.equal(actual, backward(reference, x, grad, statistics, upstream))
    assert torch.equal(actual, grad) == (unit < 2.0**-63)


def test_gradient_of_the_kernels_own_statistics(small_sample):
    x = make_rows(["normal", "ties", "rectified"], 3 * 1025, torch.float32)
    grad = torch.zeros_like(x)
    upstream = torch.ones(3, device=DEVICE)
    statistics = triton_kernels.outlier_statistics(x, 3, False)
    actual = backward(triton_kernels, x, grad, statistics, upstream)
    wide = reference.outlier_statistics(x.double(), 3, False)
    truth = backward(reference, x.double(), grad.double(), wide, upstream.double())
    scale = torch.maximum(truth.abs(), truth.square().mean(1, keepdim=True).sqrt())
    assert ((actual - truth).abs() <= 4e-6 * scale).all()


@pytest.mark.parametrize(
    ("size", "dtype"), [*((65537, dtype) for dtype in DTYPES), (2 * 65536 + 13, torch.float32)]
)
def test_gradient_above_the_sample_size(size, dtype):
    x = make_rows(["ties"], size, dtype)
    # a float32 gradient, for the interpreter truncates what it stores as bfloat16
    grad = torch.randn(1, size, device=DEVICE) * 1e-2
    statistics = reference.outlier_statistics(x, 1, False)
    upstream = torch.ones(1, device=DEVICE)
    actual = backward(triton_kernels, x, grad, statistics, upstream)
    assert torch.equal(actual, backward(reference, x, grad, statistics, upstream))


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float16,
        pytest.param(
            torch.bfloat16,
            marks=pytest.mark.skipif(not HAS_GPU, reason="the interpreter truncates to bfloat16"),
        ),
    ],
)
def test_gradient_of_half_precision(dtype, small_sample):
    x = make_rows(["ties", "normal"], 5000, dtype)
    grad = torch.randn(2, 5000).to(DEVICE, dtype)
    statistics = reference.outlier_statistics(x, 2, False)
    upstream = torch.tensor([100.0, -3.0], device=DEVICE)
    actual = backward(triton_kernels, x, grad, statistics, upstream)
    assert_same_bits(actual, backward(reference, x, grad, statistics, upstream))


@pytest.mark.parametrize("size", [513, 1024, 5000, 7 * 1025, 65 * 1024])
def test_gradient_reaches_exactly_the_sample(size, small_sample):
    """Without the deviation's term, only maximum and sampled elements at the median move."""
    x = torch.randint(0, 2, (2, size), device=DEVICE) * 2.0 - 1
    x[0, size // 2] = 9.0
    x[1, -1] = -9.0
    statistics = reference.outlier_statistics(x, 2, False)
    upstream = torch.ones(2, device=DEVICE)
    actual = backward(
        triton_kernels, x, torch.zeros_like(x), statistics, upstream, detach_deviation=True
    )
    expected = torch.zeros(2, size, dtype=torch.bool, device=DEVICE)
    expected[:, reference.sample_positions(size, DEVICE)] = True
    expected[0, size // 2] = True
    expected[1, -1] = True
    assert torch.equal(actual != 0, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("detach_deviation", [False, True])
def test_gradient_of_rows_without_one(detach_deviation, dtype, small_sample):
    x = make_rows(["normal"] * 4, 3000, dtype)
    x[0, 5] = torch.nan
    x[1] = torch.inf
    x[2] = 0.25
    x[3, 9] = torch.nan
    grad = torch.randn(4, 3000).to(DEVICE, dtype)
    grad[:, 7] = -0.0
    statistics = reference.outlier_statistics(x, 4, False)
    upstream = torch.tensor([0.0, 0.0, 1.0, 1.0], device=DEVICE)
    options = {"detach_deviation": detach_deviation}
    actual = backward(triton_kernels, x, grad, statistics, upstream, **options)
    # nobody asks for the first two, and the third has no deviation
    assert_same_bits(actual[:3], grad[:3])
    assert actual[3].isnan().all()


def test_gradient_of_nothing_and_of_float64():
    empty = torch.empty(0, 5)
    assert backward(triton_kernels, empty, empty, torch.empty(0, 7), empty[:, 0]).shape == (0, 5)
    x = torch.randn(3, 50, dtype=torch.float64, device=DEVICE)
    statistics = reference.outlier_statistics(x, 3, False)
    actual = backward(triton_kernels, x, x, statistics, statistics[:, 0])
    assert torch.equal(actual, backward(reference, x, x, statistics, statistics[:, 0]))
