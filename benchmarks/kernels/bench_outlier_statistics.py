"""Outlier statistics: ours, eq. 2 in plain PyTorch, and the read that bounds both."""

import pytest
import torch

from benchmarks import eager
from benchmarks.kernels.inputs import compiler, fixtures
from quanttune.fused_observer import outlier_ratio
from quanttune.reference import SAMPLE_SIZE

# the median is exact in the first two, sampled in the third
SHAPES = {"small": (2, 24 * 384), "minilm feed-forward": (16, 36_864), "8 x 1,048,576": (8, 2**20)}
x, large = fixtures(SHAPES)
forward = pytest.mark.benchmark(group="forward")
step = pytest.mark.benchmark(group="forward and backward")


@forward
def test_quanttune_forward(benchmark, x):
    eager.check_ratio(outlier_ratio(x), x, exact=x.shape[1] <= SAMPLE_SIZE)
    benchmark(outlier_ratio, x)


@forward
def test_eager_forward(benchmark, x):
    benchmark(eager.ratio, x)


@forward
@compiler
def test_compiled_forward(benchmark, large):
    compiled = torch.compile(eager.ratio, dynamic=False)
    torch.testing.assert_close(compiled(large), eager.ratio(large), rtol=1e-2, atol=0)
    benchmark(compiled, large)


@step
def test_quanttune_forward_and_backward(benchmark, x):
    eager.check_gradient(eager.gradient(outlier_ratio, x), x)
    benchmark(eager.gradient, outlier_ratio, x)


@step
def test_eager_forward_and_backward(benchmark, x):
    benchmark(eager.gradient, eager.ratio, x)


@step
@compiler
def test_compiled_forward_and_backward(benchmark, large):
    compiled = torch.compile(eager.ratio, dynamic=False)
    eager.check_gradient(eager.gradient(compiled, large), large)
    benchmark(eager.gradient, compiled, large)


@forward
def test_read(benchmark, x):
    benchmark(x.sum)
