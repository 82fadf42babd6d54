"""The ops that search the range of a grid, in plain PyTorch.

The kernels read a tensor once for all candidates. They add in another order, so their sums agree
with these to 1e-10 of themselves; counts are equal.
"""

import torch
from torch import Tensor

from . import accumulator_dtype


def quantization_errors(x: Tensor, steps: Tensor, qmin: int, qmax: int) -> Tensor:
    """Return, for each step s, the sum of (x - s * clamp(rint(x / s), qmin, qmax))^2 over x.

    x goes to float32 first and codes are those of `reference.fake_quant`; what follows is float64,
    so that the rounding of s * code to the type of x is not part of the error. A grid with a zero
    point z has the bounds qmin - z and qmax - z; 0 must lie between them.
    """
    values = x.flatten().float()
    wide = values.to(accumulator_dtype(x))
    errors = steps.new_zeros(steps.shape, dtype=wide.dtype)
    for index, step in enumerate(steps):
        code = torch.round(values / step).clamp(qmin, qmax)
        errors[index] = (wide - code.to(wide.dtype) * step.to(wide.dtype)).square().sum()
    return errors


def magnitude_histogram(x: Tensor, width: float, bins: int) -> Tensor:
    """Return how many |x| lie in [i * width, (i + 1) * width), for i below `bins`, as int64.

    What lies beyond counts in the last bin, and so does NaN. The bin is that of |x| / width in
    float32.
    """
    position = x.flatten().float().abs() / width
    position = torch.where(position < bins - 1, position, bins - 1)
    return torch.bincount(position.int(), minlength=bins)
