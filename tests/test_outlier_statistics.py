"""Outlier statistics: exact order statistics, sums within the gates, the exact gradient of both.

A gate compares with extended-precision or float64 arithmetic on the already rounded inputs, so the
16-bit formats have the gates of float32: their statistics are computed and returned in float32.
"""

import math
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quanttune import cpu, fused_observer, reference
from quanttune.reference import (
    DEVIATION,
    MAXIMUM,
    MAXIMUM_COUNT,
    MEAN,
    MEDIAN,
    MEDIAN_COUNT,
    RATIO,
    sample_positions,
)

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
SIZES = [1, 2, 3, 7, 255, 1023, 1025, 16384, 16385, 36864, 65536, 65537, 131072 + 13, 200000]
EXACT_COLUMNS = [MAXIMUM, MEDIAN, MAXIMUM_COUNT, MEDIAN_COUNT]


def assert_same_bits(actual, expected, *, signed_zero=True):
    """Equal dtypes and bits. Any NaN equals any other, and without `signed_zero` 0 equals -0."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    integers = INTEGERS[expected.element_size()]
    equal = actual.contiguous().view(integers) == expected.contiguous().view(integers)
    equal |= actual.isnan() & expected.isnan()
    if not signed_zero:
        equal |= (actual == 0) & (expected == 0)
    assert equal.all(), f"{int((~equal).sum())} of {equal.numel()} differ"


def result_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def statistics(x, exact=False):
    """Return the kernel's statistics of the rows of a matrix."""
    return cpu.outlier_statistics(x, len(x), exact)


def gradient(x, ratio_grad, exact=False, detach=False, grad=None, module=cpu):
    """Return grad + the gradient of sum(ratio_grad * ratio) for the rows of a matrix."""
    grad = torch.zeros_like(x) if grad is None else grad
    columns = statistics(x, exact)
    return module.outlier_statistics_backward(grad, x, columns, ratio_grad, exact, detach)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_maximum_median_and_counts_are_exact(size, dtype, exact):
    for samples in range(1, 6) if size < 2000 else (1 + size % 5,):
        smooth = torch.randn(samples, size)
        for x in (smooth.to(dtype), (smooth * 8).round().to(dtype), smooth.relu().to(dtype)):
            expected = reference.outlier_statistics(x, samples, exact)[:, EXACT_COLUMNS]
            assert_same_bits(statistics(x, exact)[:, EXACT_COLUMNS], expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 2, 7, 8, 1001])
def test_the_definition_by_sorting(size, dtype):
    x = (torch.randn(3, size) * 4).round().to(dtype)
    for row, columns in zip(x.double(), statistics(x), strict=True):
        magnitudes = sorted(abs(value) for value in row.tolist())
        middle = magnitudes[(size - 1) // 2]
        assert columns[MAXIMUM] == magnitudes[-1]
        assert columns[MEDIAN] == middle
        assert columns[MAXIMUM_COUNT] == magnitudes.count(magnitudes[-1])
        assert columns[MEDIAN_COUNT] == magnitudes.count(middle)


def hashed_position(stratum, stride):
    """The contract of docs/kernels.md 3.2 in Python's integers."""
    mixed = stratum * 0x9E3779B1 % 2**32
    mixed = (mixed ^ mixed >> 16) * 0x7FEB352D % 2**32
    mixed = (mixed ^ mixed >> 15) * 0x846CA68B % 2**32
    mixed ^= mixed >> 16
    return stratum * stride + mixed * stride // 2**32


@pytest.mark.parametrize("size", [1, 65536, 65537, 131072, 131073, 200000, 1 << 20, 8388607])
def test_sample_positions(size):
    stride = math.ceil(Fraction(size, 65536))
    positions = sample_positions(size)
    assert positions.dtype == torch.int64
    assert positions.tolist() == [hashed_position(i, stride) for i in range(size // stride)]
    assert torch.equal(positions // stride, torch.arange(size // stride))
    assert positions[-1] < size


def rank_error(magnitudes, median):
    """Return by how much of the data the rank of `median` misses the middle."""
    below, upto = (torch.searchsorted(magnitudes, median, right=right) for right in (False, True))
    size = len(magnitudes)
    return max(0.0, below.item() / size - 0.5, 0.5 - upto.item() / size)


def structures(tokens, channels):
    """Yield the kinds of data on which a sample could miss the median."""
    size, channel, token = tokens * channels, torch.arange(channels), torch.arange(tokens)
    at = torch.arange(size)
    normal = torch.randn(tokens, channels)
    stride = math.ceil(size / 65536)
    half = (stride + (at // stride) % 2 * (stride % 2)) // 2
    yield "gauss", normal
    yield "gauss bfloat16", normal.bfloat16()
    yield "relu", normal.relu()
    yield "gelu bfloat16", torch.nn.functional.gelu(normal).bfloat16()
    yield "six outlier channels", normal * (1 + 999 * (channel % (channels // 6 + 1) == 3))
    yield "channel scales", normal * torch.exp(2 * torch.randn(channels))
    yield "token scales", normal * torch.exp(2 * torch.randn(tokens, 1))
    yield "interleaved channels", normal * torch.where(channel % 2 == 0, 1e-3, 1e3)
    yield "blocks of channels", normal * torch.where(channel < int(0.51 * channels), 1e-3, 1e3)
    yield "half of the tokens", normal * torch.where(token < tokens // 2 + 1, 1e-3, 1e3)[:, None]
    yield "sorted", at.float()
    yield "period 3", (at % 3).float()
    yield "half of every stratum", torch.where(at % stride < half, 1e-3, 1e3) * torch.rand(size)
    yield "two points", 2.0 - (torch.rand(size) < 0.505).float()
    yield "far from zero", 1000 + 1e-3 * normal
    yield "cauchy", torch.tan(math.pi * (torch.rand(size) - 0.5))


@pytest.mark.parametrize(
    ("tokens", "channels", "regular_fails"),
    [(197, 768, {"period 3"}), (512, 1024, {"interleaved channels", "half of every stratum"})],
)
def test_the_sampled_median_misses_the_middle_by_less_than_one_percent(
    tokens, channels, regular_fails
):
    failures = set()
    for name, x in structures(tokens, channels):
        row = x.reshape(1, -1)
        magnitudes = row[0].float().abs().sort().values
        assert rank_error(magnitudes, statistics(row)[0, MEDIAN]) < 0.01, name
        regular = row[:, :: math.ceil(row.numel() / 65536)].float().abs().median()
        if rank_error(magnitudes, regular) >= 0.01:
            failures.add(name)
    # so the data can tell a good sample from a bad one
    assert regular_fails <= failures


GAUSS, HEAVY, FIRST, LAST, CHANNEL = range(5)


def adversarial_rows(size, dtype):
    """Return one row for each distance of the mean from zero and each kind of noise."""
    rows = []
    for mean in (0, 1, 10, 1e2, 1e3, 1e4):
        for kind in (GAUSS, HEAVY, FIRST, LAST, CHANNEL):
            noise = torch.randn(size)
            if kind == HEAVY:
                noise = noise * torch.exp(1.5 * torch.randn(size))
            elif kind == FIRST:
                noise[0] = 1000
            elif kind == LAST:
                noise[-1] = -1000
            elif kind == CHANNEL:
                noise[3::97] *= 1000
            rows.append((noise.double() + mean).to(dtype))
    return torch.stack(rows)


def extended_statistics(row, median):
    """Return mean, deviation and ratio of one row with 64 bits of precision, in two passes."""
    row = row.double().numpy().astype(np.longdouble)
    mean = row.sum() / row.size
    deviation = np.sqrt(np.square(row - mean).sum() / max(row.size - 1, 1))
    spread = np.abs(row).max() - np.longdouble(median)
    return mean, deviation, spread / deviation if deviation else 0


def largest_ratio(size):
    """Bound max|A| - mean|A| by Samuelson, and mean|A| - median|A| by the deviation."""
    return (math.sqrt(size - 1) + 1) * math.sqrt((size - 1) / size) * (1 + 1e-6)


def gates(dtype, mean, deviation):
    """Return the relative errors allowed for mean and deviation, and for the ratio.

    Rounding of the result and a few of the sums, and where the mean is far from zero the
    cancellation against it (docs/reliability.md 2.2); float64 has 29 bits more.
    """
    if dtype == torch.float64:
        return 1e-13, 1e-12
    unit = 2.0**-24
    distance = math.sqrt(1 + (mean / deviation) ** 2) if deviation else 0
    gate = 16 * unit + (8 * unit * distance) ** 2
    return gate, gate + 4 * unit


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [2, 3, 255, 1025, 16385, 65537, 200000])
def test_mean_deviation_and_ratio(size, dtype):
    x = adversarial_rows(size, dtype)
    for row, columns in zip(x, statistics(x).tolist(), strict=True):
        mean, deviation, ratio = extended_statistics(row, columns[MEDIAN])
        gate, ratio_gate = gates(dtype, mean, deviation)
        # where the mean is near zero, its error counts against the deviation
        assert abs(columns[MEAN] - mean) <= gate * max(abs(mean), deviation)
        assert abs(columns[DEVIATION] - deviation) <= gate * deviation
        assert abs(columns[RATIO] - ratio) <= ratio_gate * ratio
        assert size > 65536 or 0 <= columns[RATIO] <= largest_ratio(size)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_reference_is_within_the_gates(dtype):
    x = adversarial_rows(1025, dtype)
    for row, columns in zip(
        x, reference.outlier_statistics(x, len(x), False).tolist(), strict=True
    ):
        mean, deviation, ratio = extended_statistics(row, columns[MEDIAN])
        gate, ratio_gate = gates(dtype, mean, deviation)
        # where the mean is near zero, its error counts against the deviation
        assert abs(columns[MEAN] - mean) <= gate * max(abs(mean), deviation)
        assert abs(columns[DEVIATION] - deviation) <= gate * deviation
        assert abs(columns[RATIO] - ratio) <= ratio_gate * ratio


@pytest.mark.parametrize("module", [cpu, reference])
@pytest.mark.parametrize("dtype", DTYPES)
def test_ratios_by_hand(dtype, module):
    rows = [
        ([1, -2, 3, -10], 1.399708),
        ([0, 0, 5, 0, 0, 0, 0, 0, 0], 3.0),
        ([-7] + [0] * 9999, 100.0),
        ([2.5, -2.5] * 50, 0.0),
        ([3], 0.0),
        ([3, 3, 3], 0.0),
    ]
    for row, ratio in rows:
        columns = module.outlier_statistics(torch.tensor([row], dtype=dtype), 1, False)
        assert columns[0, RATIO].item() == pytest.approx(ratio, rel=4e-7, abs=0)


@pytest.mark.parametrize("module", [cpu, reference])
@pytest.mark.parametrize(
    ("median", "degrees", "expected"),
    [(2, 4, 1.616244), (2, 3, 1.399708), (2.5, 4, 1.515229), (2.5, 3, 1.312227)],
)
def test_other_readings_of_the_paper_by_hand(module, median, degrees, expected):
    """Of [1, -2, 3, -10]: the middle of both medians, N in the denominator of the variance."""
    row = torch.tensor([[1.0, -2.0, 3.0, -10.0]])
    found = module.outlier_statistics(row, 1, False)[0].tolist()
    assert (found[MAXIMUM], found[MEDIAN]) == (10, 2)
    other = (found[MAXIMUM] - median) / (found[DEVIATION] * (3 / degrees) ** 0.5)
    assert other == pytest.approx(expected, rel=4e-7)


def test_the_ratio_of_gaussian_data():
    # of 36,864 = 48 x 768 values the largest is near 4.3 deviations, and the median near 0.67
    ratio = statistics(torch.randn(20, 36864))[:, RATIO].mean()
    assert 3.4 < ratio < 4.0


@settings(derandomize=True, deadline=None, max_examples=100)
@given(st.lists(st.floats(-1e3, 1e3, width=16), min_size=1, max_size=40))
def test_property_the_ratio_is_bounded(values):
    assert 0 <= statistics(torch.tensor([values]))[0, RATIO] <= largest_ratio(len(values))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1023, 70001])
def test_scaling_by_a_power_of_two_leaves_the_ratio(size, dtype):
    # no subnormals, which scaling would round
    x = torch.randn(2, size).clamp(-6, 6).to(dtype)
    x = torch.where(x.abs() < 2**-7, 2**-7, x)
    expected = statistics(x)
    for factor in (2.0**-6, -(2.0**-3), -1.0, 2.0**9):
        columns = statistics(x * factor)
        assert_same_bits(columns[:, RATIO], expected[:, RATIO])
        assert_same_bits(columns[:, DEVIATION], expected[:, DEVIATION] * abs(factor))
        assert_same_bits(columns[:, MEAN], expected[:, MEAN] * factor)


@pytest.mark.parametrize("size", [1023, 70001])
def test_permuting_a_sample(size):
    x = torch.randn(2, size)
    expected, columns = (statistics(rows, True) for rows in (x, x[:, torch.randperm(size)]))
    assert_same_bits(columns[:, EXACT_COLUMNS], expected[:, EXACT_COLUMNS])
    torch.testing.assert_close(columns[:, RATIO], expected[:, RATIO], rtol=20 * 2.0**-24, atol=0)


def test_a_sample_does_not_know_its_neighbours():
    x = torch.randn(5, 70001) * torch.tensor([1e-3, 1, 1e3, 1, 1e6])[:, None]
    alone = torch.cat([statistics(row[None]) for row in x])
    assert_same_bits(statistics(x), alone)


@pytest.mark.parametrize(("samples", "size"), [(16, 36864), (3, 200000), (1, 131072 + 13)])
def test_any_number_of_threads_gives_the_same_bits(samples, size, with_threads):
    x, grad = torch.randn(samples, size), torch.randn(samples, size)
    ratio_grad = torch.randn(samples)
    with_threads(1)
    forward, backward = statistics(x), gradient(x, ratio_grad, grad=grad)
    for threads in (1, 2, 4):
        with_threads(threads)
        for _ in range(20):
            assert_same_bits(statistics(x), forward)
        assert_same_bits(gradient(x, ratio_grad, grad=grad), backward)


def test_python_threads_do_not_share_buffers():
    rows = [torch.randn(2, 70000 + 1000 * i) for i in range(8)]
    expected = [statistics(x) for x in rows]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            for actual, wanted in zip(pool.map(statistics, rows), expected, strict=True):
                assert_same_bits(actual, wanted)


STRIDED = {
    "transposed": lambda x: x.t(),
    "every other column": lambda x: x[:, ::2],
    "offset": lambda x: x[2:, 3:],
    "expanded": lambda x: x[:1].expand(4, -1),
    "permuted": lambda x: x.reshape(4, 25, 10, -1).permute(0, 3, 1, 2),
    "channels last": lambda x: x.reshape(4, 25, 10, -1).to(memory_format=torch.channels_last),
    "negated": lambda x: torch.complex(x, x).conj().imag,
}


@pytest.mark.parametrize("layout", STRIDED)
def test_strided_tensors_give_the_bits_of_contiguous_ones(layout):
    x, grad = (STRIDED[layout](torch.randn(500, 700)).requires_grad_() for _ in range(2))
    dense = x.detach().clone(memory_format=torch.contiguous_format).resolve_neg().requires_grad_()
    results = []
    for rows in (x, dense):
        y, observed = fused_observer.observe(rows, 2)
        (slope,) = torch.autograd.grad((y, observed.ratio), rows, (grad, torch.tensor([1.5, -2.0])))
        results.append((torch.stack(observed), slope))
    for actual, expected in zip(*results, strict=True):
        assert_same_bits(actual, expected)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1025, 40000, 70000])
def test_one_bad_value_spoils_its_sample_alone(size, dtype, bad):
    x, ratio_grad = torch.randn(3, size).to(dtype), torch.ones(3, dtype=result_dtype(dtype))
    clean, slope = statistics(x), gradient(x, ratio_grad)
    # first, last, middle, the edges of lanes, blocks and chunks, the incomplete last lanes
    edges = [0, 15, 16, 255, 256, 511, 512, size // 2, 16383, 16384, 32768, size - 2, size - 1]
    for position in (edge for edge in edges if edge < size):
        for fill in (0, 2):  # a whole sample at the same time
            spoiled = x.clone()
            spoiled[1, position], spoiled[fill] = bad, bad
            columns, kept = statistics(spoiled), 2 - fill
            assert columns[[1, fill]].isnan().all()
            assert_same_bits(columns[kept], clean[kept])
    spoiled_slope = gradient(spoiled, ratio_grad)
    assert_same_bits(spoiled_slope[kept], slope[kept])
    assert spoiled_slope[1].isnan().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_the_reference_spoils_the_same_columns(bad):
    x = torch.randn(2, 1025)
    x[1, 700] = bad
    columns = reference.outlier_statistics(x, 2, False)
    assert columns[1].isnan().all()
    assert columns[0].isfinite().all()


EXTREMES = [
    (torch.float32, 3e38),
    (torch.float32, 1e30),
    (torch.float32, 1e-30),
    (torch.float32, 1e-38),
    (torch.float32, 1e-43),
    (torch.bfloat16, 3e38),
    (torch.bfloat16, 1e-39),
    (torch.float16, 65504.0),
    (torch.float16, 1e-6),
    (torch.float64, 1e100),
    (torch.float64, 1e-100),
]


@pytest.mark.parametrize(("dtype", "unit"), EXTREMES)
def test_huge_and_tiny_values_have_finite_statistics(dtype, unit):
    for size in (7, 1025, 70000):
        noise = torch.randn(1, size, dtype=torch.float64)
        x = (noise / noise.abs().max() * unit).to(dtype)
        columns = statistics(x)[0].tolist()
        _, deviation, ratio = extended_statistics(x[0], columns[MEDIAN])
        assert all(map(math.isfinite, columns))
        # a deviation below the smallest float is rounded to a multiple of it
        rounding = 0 if dtype == torch.float64 else 2.0**-150
        assert abs(columns[DEVIATION] - deviation) <= 16 * 2.0**-24 * deviation + rounding
        assert abs(columns[RATIO] - ratio) <= 20 * 2.0**-24 * ratio


@pytest.mark.parametrize("module", [cpu, reference])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_deviation_whose_square_is_no_number_has_no_gradient(dtype, module):
    least = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).tiny ** 0.5
    x, grad = torch.randn(2, 1025, dtype=torch.float64), torch.randn(2, 1025).to(dtype)
    for size, has_gradient in ((0.9, False), (1e-19, False), (1.1, True)):
        scaled = (x / x.std(1, keepdim=True) * least * size).to(dtype)
        columns = module.outlier_statistics(scaled, 2, False)
        ratio_grad = torch.ones(2, dtype=columns.dtype)
        result = module.outlier_statistics_backward(grad, scaled, columns, ratio_grad, False, False)
        assert result.isfinite().all()
        assert torch.equal(result, grad) != has_gradient


@pytest.mark.parametrize("module", [cpu, reference])
@pytest.mark.parametrize("value", [0.0, 1.0, -3.5, 0.1, 1e-45, 65504.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_constants_have_no_ratio_and_no_gradient(dtype, value, module):
    for size in (1, 2, 3, 1025, 16385, 200001):
        x = torch.full((2, size), value, dtype=dtype)
        columns = module.outlier_statistics(x, 2, False)
        assert columns[:, [DEVIATION, RATIO]].tolist() == [[0, 0], [0, 0]]
        assert columns[:, MEAN].tolist() == x[:, 0].tolist()
        grad = torch.randn(2, size).to(dtype)
        ratio_grad = torch.ones(2, dtype=columns.dtype)
        result = module.outlier_statistics_backward(grad, x, columns, ratio_grad, False, False)
        assert_same_bits(result, grad)


def test_no_samples():
    x = torch.empty(0, 5)
    for module in (cpu, reference):
        columns = module.outlier_statistics(x, 0, False)
        assert columns.shape == (0, 7)
        result = module.outlier_statistics_backward(x, x, columns, torch.empty(0), False, False)
        assert result.shape == (0, 5)


@pytest.mark.parametrize(("exact", "detach"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 2, 3, 255, 1023, 16385, 65536, 65537, 200000])
def test_the_kernel_gives_the_bits_of_the_reference(size, dtype, exact, detach):
    smooth = torch.randn(3, size)
    grad, ratio_grad = torch.randn(3, size).to(dtype), torch.tensor([1.5, 0.0, -300.0])
    ratio_grad = ratio_grad.to(result_dtype(dtype))
    for x in (smooth.to(dtype), (smooth * 4).round().to(dtype), smooth.relu().to(dtype)):
        arguments = (x, ratio_grad, exact, detach, grad)
        actual, expected = (gradient(*arguments, module) for module in (cpu, reference))
        assert_same_bits(actual, expected, signed_zero=False)


def ratio_by_autograd(rows, exact):
    """Eq. 2 in float64 on plain autograd, with the gradient shared among tied elements."""
    magnitudes = rows.abs()
    sampled = magnitudes if exact else magnitudes[:, sample_positions(rows.shape[1])]
    middle = sampled.detach().sort(1).values[:, (sampled.shape[1] - 1) // 2, None]
    tied = (sampled.detach() == middle).double()
    median = (sampled * tied).sum(1) / tied.sum(1)
    return (magnitudes.amax(1) - median) / rows.std(1)


# docs/reliability.md 2.2 for float32: relative to each element or, for the small ones whose terms
# cancel, to the root mean square. A 16-bit result is rounded once more, by half an ulp.
GRADIENT_GATE = {
    torch.float32: 4e-6,
    torch.float64: 1e-10,
    torch.float16: 4e-6 + 2.0**-11,
    torch.bfloat16: 4e-6 + 2.0**-8,
}


def assert_within_gradient_gate(actual, expected):
    scale = expected.abs().maximum(expected.square().mean(1, keepdim=True).sqrt())
    error = ((actual.double() - expected).abs() / scale).max().item()
    assert error <= GRADIENT_GATE[actual.dtype]


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [31, 255, 1025, 36864, 70001])
def test_the_gradient_is_that_of_float64_autograd(size, dtype, exact):
    for mean, deviation in ((0, 1), (2, 0.5), (-100, 1)):
        x = (torch.randn(3, size) * deviation + mean).to(dtype)
        # in the normal range of float16 even for long rows
        ratio_grad = torch.tensor([1024.0, -700.0, 512.0], dtype=result_dtype(dtype))
        rows = x.double().requires_grad_()
        (ratio_by_autograd(rows, exact) @ ratio_grad.double()).backward()
        assert_within_gradient_gate(gradient(x, ratio_grad, exact), rows.grad)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sample_without_upstream_keeps_its_gradient(dtype):
    x, grad = torch.randn(3, 70001).to(dtype), torch.randn(3, 70001).to(dtype)
    x[0, 5], x[2, 100], x[2, 200] = math.nan, math.inf, -math.inf
    grad[0, 7] = -0.0
    assert_same_bits(gradient(x, torch.zeros(3, dtype=result_dtype(dtype)), grad=grad), grad)


def test_ties_share_the_gradient():
    # maximum 4 three times, median 2 twice: of nine elements the fifth smallest
    x = torch.tensor([[4.0, -4, 4, 2, -2, 1, 0, 3, 1]])
    share = gradient(x, torch.ones(1), detach=True) * statistics(x)[0, DEVIATION]
    expected = torch.tensor([[1, -1, 1, 0, 0, 0, 0, 0, 0]]) / 3
    expected[0, 3], expected[0, 4] = -1 / 2, 1 / 2
    torch.testing.assert_close(share, expected, rtol=3e-7, atol=0)


def test_a_median_of_zero_has_no_gradient():
    x = torch.tensor([[0.0, 0, 0, 5, -1]])
    slope = gradient(x, torch.ones(1), detach=True)
    assert slope[0, [0, 1, 2, 4]].tolist() == [0.0] * 4
    assert slope[0, 3] == 1 / statistics(x)[0, DEVIATION]


@pytest.mark.parametrize("exact", [False, True])
def test_only_sampled_elements_move_the_median(exact):
    x = torch.randint(1, 4, (1, 70001)).float()
    slope = gradient(x, torch.ones(1), exact, detach=True)[0]
    columns = statistics(x, exact)[0]
    sampled = torch.zeros(70001, dtype=torch.bool)
    sampled[sample_positions(70001) if not exact else slice(None)] = True
    moves = sampled & (x[0] == columns[MEDIAN])
    assert moves.sum() == columns[MEDIAN_COUNT]
    assert torch.equal(slope < 0, moves)
    assert torch.equal(slope > 0, x[0] == columns[MAXIMUM])


def test_detaching_the_deviation_leaves_out_its_term():
    x = torch.randn(2, 1023)
    columns = statistics(x).double()
    ratio_grad = torch.tensor([2.0, -3.0])
    full, detached = (gradient(x, ratio_grad, detach=detach) for detach in (False, True))
    assert (detached != 0).sum(1).tolist() == [2, 2]
    centred = x.double() - columns[:, MEAN, None]
    factor = -ratio_grad.double() * columns[:, RATIO] / (columns[:, DEVIATION] ** 2 * 1022)
    assert_within_gradient_gate(full, detached.double() + factor[:, None] * centred)


@pytest.mark.parametrize("size", [1023, 70001, 200000])
def test_the_gradient_obeys_the_invariances_of_the_ratio(size):
    x = torch.randn(2, size) + 0.5
    slope, columns = gradient(x, torch.ones(2)).double(), statistics(x).double()
    # Euler: scaling a sample does not change its ratio, so the gradient is orthogonal to the sample
    product = (slope * x).sum(1).abs()
    assert (product <= 1e-5 * slope.norm(dim=1) * x.double().norm(dim=1)).all()
    # shifting a sample moves maximum and median by one in the direction of their signs
    peak = torch.where(x.abs() == columns[:, MAXIMUM, None], x.sign(), 0).sum(1)
    sampled = x[:, sample_positions(size)]
    middle = torch.where(sampled.abs() == columns[:, MEDIAN, None], sampled.sign(), 0).sum(1)
    wanted = peak / columns[:, MAXIMUM_COUNT] - middle / columns[:, MEDIAN_COUNT]
    total = slope.sum(1) * columns[:, DEVIATION]
    torch.testing.assert_close(total, wanted.double(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"exact": True}])
def test_gradcheck(options):
    x = torch.randn(3, 40, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x: fused_observer.outlier_ratio(x, **options), x, eps=1e-6, atol=1e-7, rtol=1e-6
    )


def test_a_second_derivative_is_refused():
    x = torch.randn(2, 9, requires_grad=True)
    ratio = fused_observer.outlier_ratio(x).square().sum()
    (slope,) = torch.autograd.grad(ratio, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()
