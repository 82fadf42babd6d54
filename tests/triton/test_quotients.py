"""Codes by products instead of quotients: every x and scale where the two could differ.

Let x = X 2^i and scale = S 2^j, with 24-bit integers X and S. A code changes where the quotient
passes the middle m / 2^n of two floats, m odd with 25 bits, and no quotient is such a middle. Its
distance from one is |X 2^t - m S| / (m S) of itself for some t, so at least 2^-49. What the kernel
rounds differs from the quotient by less than 2^-47: 2^-49 since head and rest are not all of
1 / scale, 2^-48 since x * rest is rounded. So the two can differ only where |X 2^t - m S| <= 4,
which for given m, t and difference has at most one S modulo 2^t.
"""

import numpy as np
import pytest
import torch
from interpreted import DEVICE, assert_same_bits

from quanttune import reference, triton_kernels
from quanttune.triton_kernels._math import WIDEST_BY_PRODUCTS

LEAST, MOST = 1 << 23, 1 << 24


def middles(codes):
    """Yield numerator and denominator of where each code ends and the next begins."""
    for code in range(codes + 1):
        half = np.float32(code + 0.5)
        # the tie itself goes to the even code
        other = np.nextafter(half, np.float32(np.inf if code % 2 == 0 else -np.inf))
        yield ((float(half) + float(other)) / 2).as_integer_ratio()


def hard_cases(codes, differences):
    """Return all (x, scale) whose quotient is that near to a middle, up to powers of two."""
    found = []
    for m, denominator in middles(codes):
        for t in (24, 25):
            inverse = pow(m, -1, 1 << t)
            for d in differences:
                start = d * inverse % (1 << t)
                for s in range(start, MOST, 1 << t):
                    x = (m * s - d) >> t
                    if s >= LEAST and LEAST <= x < MOST:
                        found.append((x * 2.0**t / denominator, s))
    x, scale = np.array(found).T * 2.0**-30
    assert (np.float32(x) == x).all()
    return torch.from_numpy(np.float32(x)), torch.from_numpy(np.float32(scale))


def test_the_hard_cases_are_hard():
    x, scale = hard_cases(128, (-1, 1))
    quotients = x.double() / scale.double()
    assert len(x) > 50
    assert ((quotients - quotients.float().double()).abs() / quotients > 0.9 * 2.0**-26).all()
    # one product instead of two is wrong in some
    codes = (x * (1 / scale)).round()
    assert not torch.equal(codes, (x / scale).round())


@pytest.mark.parametrize("codes", [127, WIDEST_BY_PRODUCTS])
def test_codes_of_hard_cases(codes):
    x, scale = (t.to(DEVICE) for t in hard_cases(codes, [d for d in range(-6, 7) if d]))
    x = torch.stack([x, -x], 1)
    arguments = (x, scale, -codes, codes, 0)
    actual = triton_kernels.fake_quant(*arguments)
    assert torch.equal(actual, reference.fake_quant(*arguments))
    grad = torch.ones_like(x)
    for bound in {min(codes, 127), 7, 8}:
        arguments = (x, scale, -bound - 1, bound, 0)
        actual = triton_kernels.fake_quant_backward(grad, *arguments)
        assert torch.equal(actual, reference.fake_quant_backward(grad, *arguments))


VALUES = [0.0, 0.4, 0.5, 0.6, 1.0, 126.6, 127.5, 128.4, 128.5, 129.0, torch.inf, torch.nan]


@pytest.mark.parametrize("scale", [1e-45, 1e-38, 2.0**-64, 2.0**64, 3e38])
def test_scales_whose_products_over_or_underflow(scale):
    scale = torch.tensor(scale, device=DEVICE)
    x = torch.tensor(VALUES, device=DEVICE) * scale
    x = torch.cat([x, -x, torch.tensor([3e38, -3e38, 1e-45], device=DEVICE)])
    arguments = (x, scale, -128, 127, None)
    assert_same_bits(triton_kernels.fake_quant(*arguments), reference.fake_quant(*arguments))
    assert torch.equal(
        triton_kernels.fake_quant_backward(x, *arguments).nan_to_num(0.5),
        reference.fake_quant_backward(x, *arguments).nan_to_num(0.5),
    )


@pytest.mark.parametrize("scale", [0.0, torch.nan])
def test_no_gradient_passes_a_scale_that_is_none(scale):
    x = torch.tensor(VALUES, device=DEVICE)
    arguments = (torch.ones_like(x), x, torch.tensor(scale, device=DEVICE), -128, 127, None)
    assert not reference.fake_quant_backward(*arguments).any()
    assert not triton_kernels.fake_quant_backward(*arguments).any()
