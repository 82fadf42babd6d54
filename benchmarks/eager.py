"""What the benchmarks compare with, in plain PyTorch, and the checks of our answers against it."""

from collections.abc import Callable

import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# a sampled median is off by less than 1 % of the ranks, a bfloat16 gradient by half a unit of 2^-8
SAMPLED, ROUNDED = 5e-3, {torch.float32: 0.0, torch.bfloat16: 2**-8}


def normal(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """Return the same normally distributed tensor for the same shape and kind of device."""
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(shape, generator=generator, device=device).to(dtype)


def ratio(x: Tensor) -> Tensor:
    """Return (max|A| - median|A|) / std(A) of each row: eq. 2."""
    magnitude = x.abs()
    return (magnitude.amax(1) - magnitude.median(1).values) / x.std(1)


def gradient(of: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Run forward and backward, and return the gradient with respect to x."""
    x = x.detach().requires_grad_()
    return torch.autograd.grad(of(x).sum(), x)[0]


def fake_quant(x: Tensor, scale: Tensor) -> Tensor:
    """Round x to the grid of int8, as `quanttune.fake_quant` does."""
    return (torch.round(x.float() / scale).clamp(-128, 127) * scale).to(x.dtype)


def check_ratio(ours: Tensor, x: Tensor, exact: bool) -> None:
    """Compare the ratios of x with those in float64."""
    rtol = 1e-5 if exact else SAMPLED
    torch.testing.assert_close(ours.double(), ratio(x.double()), rtol=rtol, atol=0)


def check_gradient(ours: Tensor, x: Tensor) -> None:
    """Compare the gradient of the ratios of x with that in float64.

    The medians' part falls on other elements where medians are sampled or tied, so there its sum is
    compared.
    """
    ours, wide = ours.double(), x.double()
    theirs = gradient(ratio, wide)
    off = (ours - theirs).abs() > (SAMPLED + ROUNDED[x.dtype]) * theirs.abs() + 1e-3 / x.shape[1]
    magnitude = wide.abs()
    distance = (magnitude - magnitude.median(1, keepdim=True).values).abs()
    assert not (off & (distance > 0.02)).any()
    assert off.sum() <= 1e-2 * x.numel()
    near = wide.sign() * (distance <= 0.02)
    torch.testing.assert_close((ours * near).sum(1), (theirs * near).sum(1), rtol=1e-2, atol=0)


def check_fake_quant(y: Tensor, x: Tensor, scale: Tensor, ours: bool = True) -> None:
    """Compare fake-quantized x with the definition: ours bit for bit, others except near ties.

    Others multiply by 1 / scale. Near ties are common in bfloat16, which has few values.
    """
    expected = fake_quant(x, scale)
    if ours:
        assert torch.equal(y, expected)
    steps = ((y.double() - expected.double()) / scale.double()).abs()
    assert steps.max() <= 1.5
    assert (steps > 0.5).double().mean() < (1e-4 if x.dtype == torch.float32 else 1e-2)
