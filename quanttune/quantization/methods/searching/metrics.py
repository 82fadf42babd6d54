"""How far a product of rounded factors is from the exact one, added up batch by batch."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType

import torch
from torch import Tensor

SMALLEST = 1e-30  # of a norm: a channel of zeros is right whatever it is rounded to


@dataclass(frozen=True)
class Product:
    """What one batch makes of a product.

    exact: (..., channels). gradient: of the model's answer, or None. counted: bool, of a shape that
    broadcasts to it; None if no element is padding.
    """

    exact: Tensor
    gradient: Tensor | None = None
    counted: Tensor | None = None


@dataclass(frozen=True)
class Metric:
    """A loss that is a function of sums over the elements.

    terms: takes a product and the error of the rounded one, zero in padding, and returns what is
    added up. loss: takes the sums.
    """

    terms: Callable[[Product, Tensor], list[Tensor]]
    loss: Callable[..., Tensor]
    needs_gradient: bool = False

    def sums(self, product: Product, rounded: Tensor, by_channel: bool) -> Tensor:
        """Return the sums of one batch, float64 (terms, channels or 1)."""
        counted = product.counted
        error = rounded - product.exact
        if counted is not None:
            exact = product.exact.where(counted, 0)
            product, error = Product(exact, product.gradient, counted), error.where(counted, 0)
        kept = [_added_up(term, by_channel) for term in self.terms(product, error)]
        return torch.stack(kept)

    def of(self, sums: Sequence[Tensor]) -> Tensor:
        """Return the loss of all batches, float64 (channels,) or (1,)."""
        return self.loss(*torch.stack(list(sums)).sum(0))


def _added_up(term: Tensor, by_channel: bool) -> Tensor:
    if by_channel:
        return term.reshape(-1, term.shape[-1]).sum(0, dtype=torch.float64)
    return term.sum(dtype=torch.float64)[None]


def _squares(product: Product, error: Tensor) -> list[Tensor]:
    return [error.square()]


def _weighted_squares(product: Product, error: Tensor) -> list[Tensor]:
    assert product.gradient is not None
    return [(product.gradient * error).square()]


def _moments(product: Product, error: Tensor) -> list[Tensor]:
    # of the error, not of what is rounded: their difference is what counts
    return [product.exact.square(), product.exact * error, error.square()]


def _one_less_cosine(exact: Tensor, both: Tensor, error: Tensor) -> Tensor:
    norms = (exact * (exact + 2 * both + error)).sqrt()
    return torch.where(norms < SMALLEST, error, 1 - (exact + both) / norms.clamp_min(SMALLEST))


def _centred_moments(product: Product, error: Tensor) -> list[Tensor]:
    ones = torch.ones_like(error)
    if product.counted is not None:
        ones = ones.where(product.counted, 0)
    return [*_moments(product, error), product.exact, error, ones]


def _one_less_correlation(
    exact: Tensor, both: Tensor, error: Tensor, sum_exact: Tensor, sum_error: Tensor, count: Tensor
) -> Tensor:
    count = count.clamp_min(1)
    exact = exact - sum_exact.square() / count
    both = both - sum_exact * sum_error / count
    error = error - sum_error.square() / count
    return _one_less_cosine(exact.clamp_min(0), both, error.clamp_min(0))


METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        "mse": Metric(_squares, torch.Tensor.clone),
        "hessian": Metric(_weighted_squares, torch.Tensor.clone, needs_gradient=True),
        "cosine": Metric(_moments, _one_less_cosine),
        "pearson": Metric(_centred_moments, _one_less_correlation),
    }
)


def ranking(weight: float, margin: float, pairs: int) -> Metric:
    """Return Pearson's correlation and a penalty for keys whose order rounding changes.

    The penalty of a pair of keys of one query is max(0, margin - (difference of the rounded scores)
    * (sign of the exact difference)), and its mean over pairs, times `weight`, is added to 1 less
    the correlation.

    Args:
        pairs: of each query, drawn once; all where there are no more.

    Source: Liu et al., arXiv 2106.14156, eqs. 5 and 6, where the penalties are added up.
    """

    def terms(product: Product, error: Tensor) -> list[Tensor]:
        one, other = _pairs(error.shape[-1], pairs).to(error.device)
        order = (product.exact[..., one] - product.exact[..., other]).sign()
        rounded = product.exact + error
        lost = (margin - (rounded[..., one] - rounded[..., other]) * order).clamp_min(0)
        counts = torch.ones_like(lost)
        if product.counted is not None:
            counted = product.counted.expand_as(error)
            counts = (counted[..., one] & counted[..., other]).to(lost)
        return [*_centred_moments(product, error), lost * counts, counts]

    def loss(*sums: Tensor) -> Tensor:
        *moments, lost, counts = sums
        return _one_less_correlation(*moments) + weight * lost / counts.clamp_min(1)

    return Metric(terms, loss)


@cache  # each of a search's candidates asks for them
def _pairs(keys: int, most: int) -> Tensor:
    """Return pairs of keys, int64 (2, pairs)."""
    every = torch.combinations(torch.arange(keys)).T
    if every.shape[1] <= most:
        return every
    chosen = torch.randperm(every.shape[1], generator=torch.Generator().manual_seed(0))[:most]
    return every[:, chosen.sort().values]
