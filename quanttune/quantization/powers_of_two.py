"""Scales that are powers of two, by which integers are rescaled with shifts."""

import torch
from torch import Tensor

_NEAR = 1e-6  # of a power of two, in units of it: what float32 makes of one that was folded


def power_of_two_above(scale: Tensor) -> Tensor:
    """Return the smallest power of two that is not below a positive scale, of float32."""
    nearest = nearest_power_of_two(scale)
    return torch.where(scale > nearest * (1 + _NEAR), 2 * nearest, nearest)


def nearest_power_of_two(scale: Tensor) -> Tensor:
    """Return the power of two that is nearest to a positive scale, by their ratio."""
    return torch.exp2(scale.double().log2().round()).to(scale.dtype)


def is_power_of_two(scale: Tensor) -> bool:
    """Tell whether all scales are exact powers of two."""
    return bool((scale.frexp().mantissa == 0.5).all())
