"""Orthogonal matrices whose entries are all small, so that no channel keeps an outlier."""

import math

import torch
from torch import Tensor


def rotation(size: int, seed: int, keeps_mean: bool = False) -> Tensor:
    """Return an orthogonal float64 matrix Q for rows: x becomes x Q.

    Random signs, then a Hadamard matrix of the largest power of two that divides `size`, times a
    Hartley matrix for the rest.

    Args:
        keeps_mean: let Q map the vector of ones to itself, so that a LayerNorm, which subtracts the
            mean, does to x Q what it does to x.
    """
    if size == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (size, 1), generator=generator) * 2 - 1
    power = size & -size
    mixed = signs * torch.kron(_hadamard(power), _hartley(size // power))
    if not keeps_mean:
        return mixed
    # a reflection moves where the ones have come to back to the ones
    ones = torch.full((size,), size**-0.5, dtype=torch.float64)
    moved = ones @ mixed
    normal = (moved - ones) / (moved - ones).norm()
    return mixed - 2 * torch.outer(mixed @ normal, normal)


def _hadamard(size: int) -> Tensor:
    """Return Sylvester's matrix of a power of two, divided by the square root of its size."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / math.sqrt(size)


def _hartley(size: int) -> Tensor:
    """Return the matrix cos + sin of 2 pi i j / size: symmetric, orthogonal, for every size."""
    steps = torch.arange(size, dtype=torch.float64)
    # the product is reduced first, where it is exact
    angles = 2 * math.pi / size * (torch.outer(steps, steps) % size)
    return (angles.cos() + angles.sin()) / math.sqrt(size)
