"""The squared error of 90 grids on a tensor, and a histogram of its magnitudes."""

import torch

from benchmarks import eager
from benchmarks.kernels.inputs import fixtures
from quanttune import ops
from quanttune.reference import range_search

SHAPES = {"small": (2, 24, 384), "8 x 197 x 768": (8, 197, 768)}
STEPS = 0.03 * (1 - 0.01 * torch.arange(90))
GRID = STEPS, -128, 127
BINS = 0.002, 2048
x, large = fixtures(SHAPES)


def check_errors(errors, x):
    torch.testing.assert_close(
        errors, range_search.quantization_errors(x, *GRID), rtol=1e-12, atol=0
    )


def test_quanttune(benchmark, x):
    check_errors(ops.quantization_errors(x, *GRID), x)
    benchmark(ops.quantization_errors, x, *GRID)


def test_eager(benchmark, x):
    def loop():
        errors = []
        for step in STEPS:
            errors.append((eager.fake_quant(x, step) - x).double().square().sum())
        return torch.stack(errors)

    rtol = 1e-4 if x.dtype == torch.float32 else 0.3  # it rounds what it returns
    torch.testing.assert_close(
        loop(), range_search.quantization_errors(x, *GRID), rtol=rtol, atol=0
    )
    benchmark(loop)


def test_quanttune_histogram(benchmark, x):
    counts = ops.magnitude_histogram(x, *BINS)
    assert torch.equal(counts, range_search.magnitude_histogram(x, *BINS))
    benchmark(ops.magnitude_histogram, x, *BINS)


def test_eager_histogram(benchmark, x):
    def histc():
        return torch.histc(x.float().abs(), BINS[1], 0, BINS[0] * BINS[1])

    assert abs(histc().sum() - x.numel()) <= 0.01 * x.numel()  # it drops what lies beyond
    benchmark(histc)
