"""Fake quantization of a tensor: ours, PyTorch's own operator, and the copy that bounds both."""

import pytest
import torch

from quanttune import fake_quant

SHAPES = {"small": (2, 24, 384), "vit-b feed-forward": (8, 197, 3072), "8 MiB": (8, 2**20)}
SCALE = torch.tensor(0.03)


@pytest.fixture(params=SHAPES, ids=lambda name: name)
def x(request):
    return torch.randn(SHAPES[request.param], generator=torch.Generator().manual_seed(0))


def test_quanttune(benchmark, x):
    y = benchmark(fake_quant, x, SCALE)
    expected = torch.round(x.double() / SCALE.double()).clamp(-128, 127) * SCALE.double()
    # float32 and float64 quotients fall on different sides of a tie now and then: one step
    assert (y - expected).abs().max() <= 1.001 * SCALE
    assert ((y - expected).abs() > SCALE / 2).double().mean() < 1e-5


def test_torch(benchmark, x):
    benchmark(torch.fake_quantize_per_tensor_affine, x, SCALE.item(), 0, -128, 127)


def test_copy(benchmark, x):
    benchmark(x.clone)
