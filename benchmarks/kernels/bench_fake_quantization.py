"""Fake quantization of a tensor: ours, PyTorch's own operator, and the copy that bounds both."""

import torch

from benchmarks import eager
from benchmarks.kernels.inputs import compiler, fixtures
from quanttune import fake_quant, fake_quant_

SHAPES = {"small": (2, 24, 384), "vit-b feed-forward": (8, 197, 3072), "8 x 1,048,576": (8, 2**20)}
SCALE = torch.tensor(0.03)
x, large = fixtures(SHAPES)


def test_quanttune(benchmark, x):
    eager.check_fake_quant(fake_quant(x, SCALE), x, SCALE)
    benchmark(fake_quant, x, SCALE)


def test_quanttune_in_place(benchmark, x):
    y = x.clone()
    fake_quant_(y, SCALE)
    eager.check_fake_quant(y, x, SCALE)
    benchmark(fake_quant_, y, SCALE)


def test_torch(benchmark, x):
    arguments = x, SCALE.item(), 0, -128, 127
    y = torch.fake_quantize_per_tensor_affine(*arguments)
    eager.check_fake_quant(y, x, SCALE, ours=False)
    benchmark(torch.fake_quantize_per_tensor_affine, *arguments)


def test_eager(benchmark, x):
    benchmark(eager.fake_quant, x, SCALE)


@compiler
def test_compiled(benchmark, large):
    compiled = torch.compile(eager.fake_quant, dynamic=False)
    eager.check_fake_quant(compiled(large, SCALE), large, SCALE, ours=False)
    benchmark(compiled, large, SCALE)


def test_copy(benchmark, x):
    y = torch.empty_like(x)
    benchmark(y.copy_, x)
