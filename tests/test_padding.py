"""Padding stays out of the statistics: the ranges of the ops."""

import numpy as np
import pytest
import torch
from torch import Tensor

from quanttune import ops, reference
from quanttune.reference import MAXIMUM, MEDIAN, RATIO, SAMPLE_SIZE

KERNELS = pytest.mark.parametrize("kernels", [ops, reference], ids=["C++", "reference"])
TYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)


def padded(lengths: list[int], tokens: int, channels: int, dtype: torch.dtype, left: bool = False):
    """Return rows with NaN, inf or large numbers as padding, and the ranges of the others."""
    x = torch.randn(len(lengths), tokens, channels).to(dtype)
    ranges = []
    for row, length in enumerate(lengths):
        begin = tokens - length if left else 0
        keep = torch.zeros(tokens, dtype=torch.bool)
        keep[begin : begin + length] = True
        x[row, ~keep] = [torch.nan, torch.inf, 1e4][row % 3]
        ranges.append([begin * channels, length * channels])
    return x, torch.tensor(ranges)


def parts(x: Tensor, ranges: Tensor) -> list[Tensor]:
    return [x[i].flatten()[b : b + n] for i, (b, n) in enumerate(ranges.tolist())]


@KERNELS
@TYPES
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("exact", [False, True])
def test_statistics_are_those_of_each_row_alone(kernels, dtype, left, exact):
    x, ranges = padded([5, 1, 9, 9, 3, 8], 9, 37, dtype, left)
    actual = kernels.outlier_statistics(x, len(x), exact, ranges)
    for row, part in zip(actual, parts(x, ranges), strict=True):
        assert torch.equal(row, kernels.outlier_statistics(part[None], 1, exact)[0])


@KERNELS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("left", [False, True])
def test_long_rows_keep_the_stride_of_the_padded_row(kernels, dtype, left):
    tokens, channels = 61, 5003
    x, ranges = padded([61, 40, 2, 60, 0], tokens, channels, dtype, left)
    stride = -(-tokens * channels // SAMPLE_SIZE)
    assert stride == 5
    actual = kernels.outlier_statistics(x, len(x), False, ranges).double().numpy()
    for row, part in zip(actual[:4], parts(x, ranges), strict=False):
        values = part.double().numpy()
        positions = reference.sample_positions(len(values), "cpu", stride).numpy()
        assert (positions // stride == np.arange(len(values) // stride)).all()
        sampled = np.sort(np.abs(values[positions]))
        median = sampled[(len(sampled) - 1) // 2]
        maximum, deviation = np.abs(values).max(), values.std(ddof=1)
        assert row[MAXIMUM] == maximum
        assert row[MEDIAN] == median
        np.testing.assert_allclose(row[RATIO], (maximum - median) / deviation, rtol=1e-6)
    assert not actual[4].any()  # nothing but padding


@KERNELS
@TYPES
@pytest.mark.parametrize("shape", [(9, 37), (61, 5003)], ids=str)
@pytest.mark.parametrize("detach_deviation", [False, True])
def test_the_gradient_reaches_no_padding(kernels, dtype, shape, detach_deviation):
    tokens, channels = shape
    x, ranges = padded([tokens, 7, 1, 0, tokens - 1], tokens, channels, dtype, left=True)
    grad = torch.randn_like(x)
    # large beside the gradient that arrives, so that its rounding hides nothing
    share = torch.linspace(100, 1000, len(x), dtype=reference.result_dtype(x))
    statistics = kernels.outlier_statistics(x, len(x), False, ranges)
    options = share, False, detach_deviation
    actual = kernels.outlier_statistics_backward(grad, x, statistics, *options, ranges)
    stride = -(-tokens * channels // SAMPLE_SIZE)
    for i, (begin, length) in enumerate(ranges.tolist()):
        row, expected = actual[i].flatten(), grad[i].flatten().clone()
        part = x[i].flatten()[begin : begin + length].double().requires_grad_()
        if length:
            _ratio(part, stride, detach_deviation).backward(share[i].double())
            inside = expected[begin : begin + length]
            expected[begin : begin + length] = (inside.double() + part.grad).to(dtype)
        scale = torch.maximum(expected.abs(), expected.square().mean().sqrt())
        assert ((row - expected).abs() <= (4e-6 if dtype.itemsize > 2 else 8e-3) * scale).all()
        outside = torch.ones(tokens * channels, dtype=torch.bool)
        outside[begin : begin + length] = False
        assert torch.equal(row[outside], grad[i].flatten()[outside])


def _ratio(part: Tensor, stride: int, detach_deviation: bool) -> Tensor:
    magnitude = part.abs()
    sampled = magnitude[reference.sample_positions(len(part), "cpu", stride)]
    kth = (len(sampled) - 1) // 2
    value = sampled.detach().sort().values[kth]
    deviation = part.std()
    at_median = sampled == value  # ties share the gradient
    median = torch.where(at_median, sampled, 0).sum() / at_median.sum()
    return (magnitude.amax() - median) / (deviation.detach() if detach_deviation else deviation)


def test_threads_change_no_bit():
    x, ranges = padded([61, 40, 2, 60, 0], 61, 5003, torch.float32)
    expected = ops.outlier_statistics(x, len(x), False, ranges)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.equal(ops.outlier_statistics(x, len(x), False, ranges), expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        (torch.tensor([[0, 6], [1, 6]]), "range of 6 elements from 1 on in a sample of 6"),
        (torch.tensor([[-1, 6], [0, 6]]), "range of 6 elements from -1 on"),
        (torch.tensor([[0, 6]]), r"ranges must be int64 of shape \(2, 2\), got"),
        (torch.zeros(2, 2), "ranges must be int64"),
    ],
)
def test_ranges_that_do_not_fit_are_refused(ranges, message):
    x = torch.randn(2, 3, 2)
    with pytest.raises(ValueError, match=message):
        ops.outlier_statistics(x, 2, False, ranges)
    statistics = ops.outlier_statistics(x, 2, False)
    with pytest.raises(ValueError, match=message):
        ops.outlier_statistics_backward(x, x, statistics, torch.ones(2), False, False, ranges)


def test_the_ops_pass_opcheck():
    x, ranges = padded([3, 2], 3, 5, torch.float32)
    op = torch.ops.quanttune.outlier_statistics.default
    torch.library.opcheck(op, (x, 2, False, ranges))
