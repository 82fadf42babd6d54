"""The ops that search ranges: squared errors of many grids, and histograms of magnitudes."""

import numpy as np
import pytest
import torch
from test_fake_quantization import DTYPES, values_near_ties

from quanttune import cpu, fake_quant, ops
from quanttune.fake_quantizer import integer_range
from quanttune.reference import range_search

# Sums of some ten thousand float64 numbers without cancellation, in any order
ROUNDING = 1e-12

BACKENDS = {"reference": range_search, "C++": cpu}
SIZES = [1, 15, 1023, 1025, 16385, 40001]
each_backend = pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)


def slow_errors(x, steps, qmin, qmax):
    """The definition in numpy: codes in float32, the rest in float64."""
    x = x.float().numpy().reshape(-1)
    result = []
    for step in steps.numpy():
        code = np.clip(np.rint(x / step), qmin, qmax).astype(np.float64)
        result.append(np.square(x.astype(np.float64) - code * np.float64(step)).sum())
    return torch.tensor(result, dtype=torch.float64)


def assert_near(actual, expected):
    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual, expected, rtol=ROUNDING, atol=0)


@each_backend
def test_errors_by_hand(backend):
    x = torch.tensor([-9.0, -2.5, -0.5, 0.0, 1.25, 3.5])
    # codes -4 -2 0 0 1 3 and -4 -4(-5) -1 0 2(2.5) 3(7)
    expected = [25 + 0.25 + 0.25 + 0 + 0.0625 + 0.25, 49 + 0.25 + 0 + 0 + 0.0625 + 4]
    errors = backend.quantization_errors(x, torch.tensor([1.0, 0.5]), -4, 3)
    assert errors.tolist() == expected


@each_backend
@pytest.mark.parametrize("dtype", DTYPES)
def test_errors_agree_with_numpy(backend, dtype):
    for size in SIZES:
        x = torch.randn(size).to(dtype)
        x[size // 2] = 30
        steps = torch.cat([torch.rand(7) / 5 + 0.001, torch.tensor([1e-30, 2.0, 1e30])])
        for bounds in ((-2, 1), (-128, 127), (0, 255), (-70, 185), (-32768, 32767)):
            errors = backend.quantization_errors(x, steps, *bounds)
            assert_near(errors, slow_errors(x, steps, *bounds))


@each_backend
@pytest.mark.parametrize("bits", [3, 8])
def test_errors_are_those_of_what_fake_quant_returns(backend, bits):
    """With a step that is a power of two, what it returns is not rounded."""
    x = torch.randn(5000)
    steps = 2.0 ** -torch.arange(2.0, 9.0)
    errors = [(x.double() - fake_quant(x, step, bits).double()).square().sum() for step in steps]
    actual = backend.quantization_errors(x, steps, *integer_range(bits))
    assert_near(actual, torch.stack(errors))


@each_backend
def test_codes_are_those_of_the_rounded_quotient(backend):
    """Near a tie a code that is off by one changes the error by far more than a rounding."""
    for scale in (0.013, 37.7 / 127):
        x = values_near_ties(40001, scale, 127)
        steps = torch.tensor([scale])
        assert_near(
            backend.quantization_errors(x, steps, -128, 127), slow_errors(x, steps, -128, 127)
        )
        off = x.numpy() * (np.float32(1) / np.float32(scale))
        code = np.clip(np.rint(off), -128, 127).astype(np.float64)
        error = np.square(x.numpy().astype(np.float64) - code * np.float64(steps[0])).sum()
        assert abs(error / slow_errors(x, steps, -128, 127).item() - 1) > 100 * ROUNDING


MANY = 140_001  # elements, which are put into bins between the thresholds of all grids
ELEMENTS = {
    "normal": lambda: torch.randn(MANY),
    "heavy tailed": lambda: torch.randn(MANY) * (2 * torch.randn(MANY)).exp(),
    "rectified": lambda: torch.randn(MANY).relu(),
    "shifted": lambda: torch.randn(MANY) / 100 + 5,
    "constant": lambda: torch.full((MANY,), -1.7),
    "ties": lambda: values_near_ties(MANY, 0.013, 127),
    "tiny": lambda: torch.randn(MANY) * 1e-20,
}


@pytest.mark.parametrize("bounds", [(-128, 127), (-2, 1), (-70, 185), (0, 1)])
@pytest.mark.parametrize("kind", ELEMENTS)
def test_errors_of_many_elements(kind, bounds):
    x = ELEMENTS[kind]()
    finest = 0.013 if kind == "ties" else x.abs().max() / 400
    steps = finest * torch.tensor([1.0, 0.51, 1.9, 3.0, 1.0, 77.0])
    torch.testing.assert_close(
        cpu.quantization_errors(x, steps, *bounds),
        slow_errors(x, steps, *bounds),
        rtol=100 * ROUNDING,
        atol=0,
    )


ON_THE_GRID = {  # far from where codes change: sums of squares cancel
    "zeros": (torch.zeros(MANY), 0.8237),
    "constant": (torch.full((MANY,), -1.7), 1.7),
    "rounded": (torch.randn(MANY).div(0.3).round() * 0.3, 0.3),
    "one at a million": (torch.randn(MANY).index_fill(0, torch.tensor(5), 1e6), 1e6 / 63),
    "one at a billion": (torch.randn(MANY).index_fill(0, torch.tensor(5), 1e9), 1e9 / 63),
}


@pytest.mark.parametrize(("x", "step"), ON_THE_GRID.values(), ids=ON_THE_GRID)
def test_errors_of_elements_on_the_grid(x, step):
    steps = step * torch.tensor([0.9, 1.0, 1.1])
    torch.testing.assert_close(
        cpu.quantization_errors(x, steps, -63, 63),
        slow_errors(x, steps, -63, 63),
        rtol=100 * ROUNDING,
        atol=0,
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_errors_of_equal_elements_do_not_add_up(dtype):
    """Of what is rounded to zero, and far from the anchors; 16-bit numbers round alike."""
    x = torch.randn(131073).index_fill(0, torch.tensor(0), 900).to(dtype)
    steps = torch.tensor([53.99])
    torch.testing.assert_close(
        cpu.quantization_errors(x, steps, -16, 15),
        slow_errors(x, steps, -16, 15),
        rtol=1e-10,
        atol=0,
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_errors_of_many_elements_of_every_type(dtype):
    x = torch.randn(MANY).to(dtype)
    for steps in (torch.tensor([0.03]), torch.tensor([0.001, 0.02, 2.0]), torch.rand(300) + 0.01):
        actual = cpu.quantization_errors(x, steps, -128, 127)
        torch.testing.assert_close(
            actual, slow_errors(x, steps, -128, 127), rtol=10 * ROUNDING, atol=0
        )


@each_backend
def test_errors_of_nothing_and_of_no_candidate(backend):
    steps = torch.tensor([0.5, 1.0])
    assert backend.quantization_errors(torch.empty(0), steps, -8, 7).tolist() == [0, 0]
    assert backend.quantization_errors(torch.randn(50), steps[:0], -8, 7).shape == (0,)


@each_backend
def test_errors_of_what_is_not_finite(backend):
    steps = torch.tensor([0.5, 1.0])
    for x in (torch.randn(3000), torch.randn(MANY)):
        for bad, wanted in ((-torch.inf, torch.isposinf), (torch.nan, torch.isnan)):
            x[1700] = bad
            assert wanted(backend.quantization_errors(x, steps, -8, 7)).all()


@each_backend
def test_histogram_by_hand(backend):
    x = torch.tensor([0.0, -0.0, 0.99, -1.0, 1.5, 2.0, 2.5, -7.0, 1e30, torch.inf, torch.nan])
    assert backend.magnitude_histogram(x, 1.0, 4).tolist() == [3, 2, 2, 4]
    assert backend.magnitude_histogram(x, 1.0, 1).tolist() == [11]


@each_backend
@pytest.mark.parametrize("dtype", DTYPES)
def test_histogram_agrees_with_numpy(backend, dtype):
    for size in SIZES:
        x = torch.randn(size).to(dtype)
        x[: size // 3] = 0.37  # many of one bin
        for width, bins in ((0.0021, 2048), (0.1, 7), (0.0003, 16384)):
            position = np.floor(np.abs(x.float().numpy()) / np.float32(width))
            expected = np.bincount(np.minimum(position, bins - 1).astype(int), minlength=bins)
            counts = backend.magnitude_histogram(x, width, bins)
            assert counts.dtype == torch.int64
            np.testing.assert_array_equal(counts.numpy(), expected)


def test_many_tasks():
    x, steps = torch.randn(2**21 + 77), torch.tensor([0.03, 0.02])
    expected = range_search.quantization_errors(x, steps, -128, 127)
    torch.testing.assert_close(
        cpu.quantization_errors(x, steps, -128, 127), expected, rtol=10 * ROUNDING, atol=0
    )
    expected = range_search.magnitude_histogram(x, 0.0021, 2048)
    assert torch.equal(cpu.magnitude_histogram(x, 0.0021, 2048), expected)


@pytest.mark.parametrize("size", [300, 50_001, 2**21 + 5])
def test_any_number_of_threads_gives_the_same_bits(size, with_threads):
    x, steps = torch.randn(size), torch.rand(3) / 10
    results = []
    for threads in (1, 2, 3):
        with_threads(threads)
        errors = cpu.quantization_errors(x, steps, -128, 127)
        results.append((errors, cpu.magnitude_histogram(x, 0.01, 500)))
    for errors, counts in results[1:]:
        assert torch.equal(errors, results[0][0])
        assert torch.equal(counts, results[0][1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    for x in (torch.randn(4, 33), torch.randn(33, 4).t(), torch.randn(1, 33).expand(4, 33)):
        x = x.to(dtype)
        torch.library.opcheck(
            torch.ops.quanttune.quantization_errors.default, (x, torch.rand(5) + 0.1, -8, 7)
        )
        torch.library.opcheck(torch.ops.quanttune.magnitude_histogram.default, (x, 0.1, 20))


def test_the_ops_take_views():
    x, steps = torch.randn(40, 30), (torch.rand(8) + 0.1)[::2]
    errors = ops.quantization_errors(x.t(), steps, -8, 7)
    assert_near(errors, slow_errors(x.t(), steps, -8, 7))
    counts = ops.magnitude_histogram(x[:, ::3], 0.1, 20)
    assert torch.equal(counts, range_search.magnitude_histogram(x[:, ::3], 0.1, 20))
