"""Padding stays out of the statistics of the Triton kernels, as in the reference.

On a GPU if there is one, else in Triton's interpreter.
"""

import pytest
import torch
from interpreted import DEVICE, make_rows

from quanttune import reference, triton_kernels
from quanttune.reference import DEVIATION, MAXIMUM, MAXIMUM_COUNT, MEAN, MEDIAN, MEDIAN_COUNT, RATIO

EXACT_COLUMNS = [MAXIMUM, MEDIAN, MAXIMUM_COUNT, MEDIAN_COUNT]
CHANNELS = pytest.mark.parametrize("channels", [32, 37])  # ranges on boundaries of 16, and not


def padded(tokens, channels, dtype, left):
    lengths = [tokens, tokens - 1, tokens // 3, 1, 0]
    x = make_rows(["normal", "ties", "shifted", "rectified", "normal"], tokens * channels, dtype)
    ranges = torch.tensor([[(tokens - n) * left * channels, n * channels] for n in lengths])
    for row, (begin, length) in zip(x, ranges.tolist(), strict=True):
        row[:begin] = torch.nan
        row[begin + length :] = torch.inf
    return x.view(len(x), tokens, channels), ranges.to(DEVICE)


def check_statistics(x, exact, ranges):
    expected = reference.outlier_statistics(x, len(x), exact, ranges)
    actual = triton_kernels.outlier_statistics(x, len(x), exact, ranges)
    assert torch.equal(actual[:, EXACT_COLUMNS], expected[:, EXACT_COLUMNS])
    near = torch.tensor([MEAN, DEVIATION, RATIO])
    torch.testing.assert_close(actual[:, near], expected[:, near], rtol=1e-5, atol=1e-6)
    assert not actual[-1].any()  # nothing but padding


@CHANNELS
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("exact", [False, True])
def test_statistics(exact, left, channels, small_sample):
    x, ranges = padded(13 if exact else 150, channels, torch.float32, left)
    check_statistics(x, exact, ranges)


def test_less_than_a_stratum_counts_as_nothing(small_sample):
    x = torch.randn(3, 1000, 3, device=DEVICE)  # strata of six elements
    ranges = torch.tensor([[0, 3000], [30, 3], [30, 6]], device=DEVICE)
    expected = reference.outlier_statistics(x, 3, False, ranges)
    actual = triton_kernels.outlier_statistics(x, 3, False, ranges)
    assert torch.equal(actual[:, EXACT_COLUMNS], expected[:, EXACT_COLUMNS])
    assert actual.any(1).tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("dtype", "exact", "channels"),
    [(torch.float16, False, 37), (torch.bfloat16, False, 32), (torch.bfloat16, True, 37)],
)
def test_statistics_of_half_precision(dtype, exact, channels, small_sample):
    x, ranges = padded(13 if exact else 150, channels, dtype, left=True)
    check_statistics(x, exact, ranges)


@CHANNELS
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize(("tokens", "detach_deviation"), [(9, True), (300, False)])
def test_gradient(tokens, left, detach_deviation, channels, small_sample):
    x, ranges = padded(tokens, channels, torch.float32, left)
    grad = torch.randn_like(x) * 1e-2
    statistics = reference.outlier_statistics(x, len(x), False, ranges)
    upstream = torch.randn(len(x), device=DEVICE)
    options = grad, x, statistics, upstream, False, detach_deviation, ranges
    actual = triton_kernels.outlier_statistics_backward(*options)
    # the same arithmetic in the same order, which leaves the gradient of padding as it is
    assert torch.equal(actual, reference.outlier_statistics_backward(*options))


def test_a_group_of_padded_and_whole_tensors(small_sample):
    group = triton_kernels.StatisticsGroup()
    cases = [padded(20, 32, torch.float32, left) for left in (False, True)]
    results = [triton_kernels.outlier_statistics(x, 5, False, r, group=group) for x, r in cases]
    whole = make_rows(["normal", "ties"], 640, torch.float32)
    results.append(triton_kernels.outlier_statistics(whole, 2, False, group=group))
    group.finish()
    for result, (x, ranges) in zip(results, [*cases, (whole, None)], strict=True):
        expected = reference.outlier_statistics(x, len(x), False, ranges)
        assert torch.equal(result[:, EXACT_COLUMNS], expected[:, EXACT_COLUMNS])
