"""Linear systems of second moments, in float64."""

import torch
from torch import Tensor

ATTEMPTS = 4  # each with ten times the damping of the one before


def damped_factor(moments: Tensor, damping: float) -> Tensor:
    """Return the lower Cholesky factor of moments + damping * I.

    More damping is tried where rounding errors left that indefinite.

    Raises:
        ValueError: there is no factor with 1000 times the damping either.
    """
    for attempt in range(ATTEMPTS):
        damped = moments.clone()
        damped.diagonal().add_(damping * 10**attempt)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            return factor
    raise ValueError(
        f"the second moments of a layer's inputs have no Cholesky factor with a damping of "
        f"{damping * 10 ** (ATTEMPTS - 1):.3g}: are the inputs finite, and the damping above 0?"
    )


def ridge(moments: Tensor, products: Tensor, damping: float) -> Tensor:
    """Return (moments + damping * I)^-1 products."""
    return torch.cholesky_solve(products, damped_factor(moments, damping))
