"""Fake quantization and outlier statistics of the Triton kernels against the reference.

On a GPU if there is one, else in Triton's interpreter.
"""

import importlib

import pytest
import torch
from interpreted import DEVICE, DTYPES, HAS_GPU, KINDS, assert_same_bits, make_rows

from quanttune import reference, triton_kernels
from quanttune.reference import DEVIATION, MAXIMUM, MAXIMUM_COUNT, MEAN, MEDIAN, MEDIAN_COUNT, RATIO
from quanttune.triton_kernels import statistics_group

# the function of the same name hides it in the package
statistics_module = importlib.import_module("quanttune.triton_kernels.outlier_statistics")

EXACT_COLUMNS = [MAXIMUM, MEDIAN, MAXIMUM_COUNT, MEDIAN_COUNT]
ROUNDING = 2.0**-24  # of float32


def make_codes(shape, scale, qmax, dtype):
    """Values on the grid, between its points, near its ends, beyond them, and the special ones."""
    codes = torch.randint(-3 * qmax, 3 * qmax, shape) / 2 + torch.randn(shape) / 3 * torch.randint(
        0, 2, shape
    )
    special = torch.tensor([0.0, -0.0, -0.4, -0.5, torch.nan, torch.inf, -torch.inf, 1e30, -1e30])
    flat = codes.view(-1)
    count = min(len(special), len(flat) // 2)
    flat[:count] = special[:count]
    return (codes * scale).to(dtype)


def check_fake_quant(shape, axis, dtype, bits, narrow=False):
    qmax = 2 ** (bits - 1) - 1
    channels = () if axis is None else (shape[axis],)
    # in bfloat16 the interpreter truncates what it stores, so let nothing need rounding
    whole = dtype == torch.bfloat16 and not HAS_GPU
    scale = torch.full(channels, 0.125) if whole else torch.rand(channels) / 10 + 0.01
    along = scale.view([-1 if dim == axis else 1 for dim in range(len(shape))])
    x = make_codes(shape, along if channels else scale, qmax, dtype).to(DEVICE)
    grad = torch.randn(shape).to(DEVICE, dtype)
    arguments = (x, scale.to(DEVICE), -qmax if narrow else -qmax - 1, qmax, axis)
    assert_same_bits(triton_kernels.fake_quant(*arguments), reference.fake_quant(*arguments))
    assert_same_bits(
        triton_kernels.fake_quant_backward(grad, *arguments),
        reference.fake_quant_backward(grad, *arguments),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((), None),
        ((1,), None),
        ((1023,), None),
        ((3, 4097), None),
        ((3, 4097), 0),
        ((41, 130), 1),
        ((2, 5, 3, 3), 1),
        ((4, 1), 0),
        ((0, 5), 1),
    ],
)
def test_fake_quant(shape, axis, dtype):
    check_fake_quant(shape, axis, dtype, bits=8)


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_fake_quant_to_any_number_of_bits(dtype, bits, narrow):
    check_fake_quant((1000,), None, dtype, bits, narrow)


def test_fake_quant_divides_rather_than_multiplying_by_the_reciprocal():
    scale = torch.rand(64, device=DEVICE) / 10 + 0.01
    # halfway between two codes a rounding error of the reciprocal decides where it goes
    x = (torch.arange(-120, 120, device=DEVICE) + 0.5) * scale[:, None]
    expected = reference.fake_quant(x, scale, -128, 127, 0)
    by_reciprocal = (x * (1 / scale)[:, None]).round() * scale[:, None]
    assert not torch.equal(by_reciprocal, expected)  # so the data can tell
    assert_same_bits(triton_kernels.fake_quant(x, scale, -128, 127, 0), expected)


def test_fake_quant_of_float64_is_the_reference():
    x = torch.randn(50, dtype=torch.float64, device=DEVICE)
    scale = torch.tensor(0.02, device=DEVICE)
    actual = triton_kernels.fake_quant(x, scale, -128, 127, None)
    assert torch.equal(actual, reference.fake_quant(x, scale, -128, 127, None))
    actual = triton_kernels.fake_quant_backward(x, x, scale, -128, 127, None)
    assert torch.equal(actual, reference.fake_quant_backward(x, x, scale, -128, 127, None))


def check_statistics(x, exact=False):
    actual = triton_kernels.outlier_statistics(x, len(x), exact)
    expected = reference.outlier_statistics(x, len(x), exact)
    assert actual.dtype == torch.float32
    assert actual.shape == (len(x), reference.COLUMNS)
    assert torch.equal(actual[:, EXACT_COLUMNS], expected[:, EXACT_COLUMNS])
    wide = x.double()
    mean = wide.mean(1)
    deviation = wide.std(1) if x.shape[1] > 1 else torch.zeros_like(mean)
    spread = expected[:, MAXIMUM].double() - expected[:, MEDIAN].double()
    constant = deviation <= 1e-12 * mean.abs()
    ratio = torch.where(constant, 0.0, spread / torch.where(constant, 1.0, deviation))
    # the project's gate: 16 roundings, and the second order of those of a mean far from zero
    shift = (1 + (mean / torch.where(constant, 1.0, deviation)).square()).sqrt()
    gate = 16 * ROUNDING + (8 * ROUNDING * shift).square()
    assert (actual[constant, DEVIATION] == 0).all()
    assert (actual[constant, RATIO] == 0).all()
    assert ((actual[:, DEVIATION] - deviation).abs() <= gate * deviation).all()
    assert ((actual[:, RATIO] - ratio).abs() <= (gate + 4 * ROUNDING) * ratio).all()
    scale = torch.maximum(mean.abs(), deviation)
    assert ((actual[:, MEAN] - mean).abs() <= gate * scale).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 2, 7, 512, 513, 1025, 3 * 1025])
def test_statistics(size, dtype, small_sample):
    check_statistics(make_rows(["ties", "shifted"], size, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1023, 3 * 1025])
def test_statistics_of_every_kind(size, dtype):
    check_statistics(make_rows(KINDS, size, dtype))


@pytest.mark.parametrize(
    ("size", "dtype"),
    [
        (65536, torch.float32),
        (65537, torch.float32),
        (2 * 65536 + 13, torch.float32),
        (65536, torch.bfloat16),
        (65537, torch.float16),
    ],
)
def test_statistics_around_the_sample_size(size, dtype):
    check_statistics(make_rows(["normal"], size, dtype))


# the maximum in every tile, and a mean far from zero
@pytest.mark.parametrize("kind", ["saturated", "shifted"])
@pytest.mark.parametrize("size", [4096, 9 * 4096, 40_000])
def test_statistics_of_parts_of_several_tiles(size, kind, monkeypatch, small_sample):
    monkeypatch.setattr(statistics_module, "PROGRAMS", 2)
    check_statistics(make_rows([kind], size, torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_exact_statistics_beyond_the_registers(dtype):
    check_statistics(make_rows(["ties"], 65536 + 77, dtype), exact=True)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("size", [6, 7, 1025])
def test_median_of_neighbouring_floats(size, exact, monkeypatch):
    """Every bit of the median counts, whether the row fits the registers or not."""
    if exact:
        monkeypatch.setattr(statistics_group, "REGISTER_SAMPLE", 0)
    middle = torch.tensor([1.0, 2.0**-126, 3e5]).view(torch.int32)  # across a power of two, too
    bits = middle[:, None] + torch.randperm(size).int() - size // 2
    sign = torch.randint(0, 2, (3, size)) * 2.0 - 1
    x = (bits.view(torch.float32) * sign).to(DEVICE)
    actual = triton_kernels.outlier_statistics(x, 3, exact)
    expected = reference.outlier_statistics(x, 3, exact)
    # the middle row is too small to be squared in float32
    assert torch.equal(actual[:, EXACT_COLUMNS], expected[:, EXACT_COLUMNS])
    assert torch.equal(actual[:, MEDIAN], x.abs().sort(1).values[:, (size - 1) // 2])


# the interpreter says so of its maximum; a GPU's is silent
@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics_of_bad_rows(dtype, small_sample):
    x = make_rows(["normal"] * 6, 5000, dtype)
    x[1, 0] = torch.nan
    x[2, 700] = torch.inf
    x[3, -1] = -torch.inf
    x[4] = torch.nan
    actual = triton_kernels.outlier_statistics(x, 6, False)
    assert actual[1:5].isnan().all()
    alone = triton_kernels.outlier_statistics(x[[0, 5]], 2, False)
    assert torch.equal(actual[[0, 5]], alone)
    assert alone.isfinite().all()


def test_statistics_of_nothing_and_of_float64():
    assert triton_kernels.outlier_statistics(torch.empty(0, 5), 0, False).shape == (0, 7)
    x = torch.randn(3, 50, dtype=torch.float64, device=DEVICE)
    actual = triton_kernels.outlier_statistics(x, 3, False)
    assert torch.equal(actual, reference.outlier_statistics(x, 3, False))


def test_statistics_of_more_dimensions():
    x = torch.randn(2, 3, 41, device=DEVICE)
    flat = triton_kernels.outlier_statistics(x.view(2, -1), 2, False)
    assert torch.equal(triton_kernels.outlier_statistics(x, 2, False), flat)


@pytest.mark.parametrize("samples", [1, 2, 64, 2049, 100_000])
@pytest.mark.parametrize("size", [1, 4096, 4097, 151_296, 2**24 + 1, 2**31 - 1])
def test_parts_cover_the_row(samples, size):
    parts, part_size = statistics_module._split(samples, size)
    assert (parts - 1) * part_size < size <= parts * part_size
    assert 1 <= parts <= statistics_module.MOST_PARTS
    assert part_size % statistics_module.TILE == 0
    # each part counts in float32
    assert part_size <= statistics_module.LONGEST_PART
