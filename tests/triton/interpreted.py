"""What the tests that run the Triton kernels share: where they run, on what rows."""

import torch

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}

KINDS = [
    "normal",
    "ties",
    "constant",
    "zeros",
    "rectified",
    "shifted",
    "outlier first",
    "saturated",
]


def assert_same_bits(actual, expected):
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert torch.equal(actual.isnan(), expected.isnan())
    bits = BITS[actual.dtype]
    known = ~expected.isnan()
    assert torch.equal(actual[known].view(bits), expected[known].view(bits))


def make_row(kind, size):
    x = torch.randn(size)
    return {
        "normal": x,
        "ties": (x * 4).round() / 4,
        "constant": torch.full((size,), -1.7),
        "zeros": torch.zeros(size),
        "rectified": (x - 0.3).relu(),
        "shifted": x + 100,
        "outlier first": torch.cat([torch.tensor([1000.0]), x[1:]]),
        "saturated": x.clamp(-0.5, 0.5),
    }[kind]


def make_rows(kinds, size, dtype):
    return torch.stack([make_row(kind, size) for kind in kinds]).to(DEVICE, dtype)
