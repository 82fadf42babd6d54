"""Which tensors hurt: the error of the output when one of them is quantized, and no other."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .probes import outputs_of, rounding_sites, sites_of
from .survey import SiteSurvey


@dataclass(frozen=True)
class Sensitivity:
    """Errors of the model's output, as ||quantized - float|| / ||float|| over all of the data."""

    everything: float
    activations: float
    weights: float
    sites: dict[str, float]  # only this tensor is quantized
    without: dict[str, float]  # all but the tensors of this kind are


def sensitivity(
    quantized: nn.Module,
    data: Sequence[Any],
    surveys: Mapping[str, SiteSurvey],
    kinds: Mapping[str, str],
    advance: Callable[[], None] = lambda: None,
) -> Sensitivity:
    """Quantize one tensor at a time, under all of its sites, and then all kinds but one.

    kinds: of each surveyed site. `advance` is called for each of them.
    """
    every = set(sites_of(quantized))
    with rounding_sites(quantized, ()):
        expected = outputs_of(quantized, data)

    def error(sites: set[str], weights: bool = False) -> float:
        with rounding_sites(quantized, sites, weights):
            result = relative_error(outputs_of(quantized, data), expected)
        advance()
        return result

    together = {site: {site, *found.aliases} for site, found in surveys.items()}
    without = {
        kind: every - set().union(*(together[site] for site in surveys if kinds[site] == kind))
        for kind in sorted(set(kinds.values()))
    }
    return Sensitivity(
        error(every, weights=True),
        error(every),
        error(set(), weights=True),
        {site: error(sites) for site, sites in together.items()},
        {kind: error(sites) for kind, sites in without.items()},
    )


def relative_error(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return ||outputs - expected|| / ||expected||, both taken as one vector."""
    noise = sum(
        (y - e).double().square().sum().item() for y, e in zip(outputs, expected, strict=True)
    )
    return float((noise / sum(e.double().square().sum().item() for e in expected)) ** 0.5)
