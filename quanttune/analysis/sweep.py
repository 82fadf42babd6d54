"""Quality against the saturation threshold (Fig. 3 of the paper) and the calibrator (Fig. 5)."""

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..quantization.calibrators import Calibrator, MinMax, Percentile
from ..quantization.simulation import quantize
from .divergence import divergence, histogram
from .error_split import ErrorSplit, Quantize, split_error
from .probes import sites_of, watch
from .survey import SiteSurvey

THRESHOLDS = (99.9, 99.99, 99.994, 99.999, 99.9999, 100.0)


class PartOfRange(MinMax):
    """Cover `percent` of the largest magnitude."""

    def __init__(self, percent: float) -> None:
        super().__init__()
        self.percent = percent

    def absmax(self) -> Tensor:
        return super().absmax() * (self.percent / 100)


_MODES: dict[str, Callable[[float], Calibrator]] = {"quantile": Percentile, "range": PartOfRange}


def threshold(percent: float, mode: str = "quantile") -> Callable[[], Calibrator]:
    """Return what makes calibrators that leave `percent` of the values, or of the range, untouched.

    The paper speaks of the range, but its 99.999 % makes sense only as a quantile of the values: in
    each batch, the mean over the batches. 100 covers everything that was seen.
    """
    if mode not in _MODES:
        raise ValueError(f"mode must be one of {', '.join(_MODES)}, got {mode!r}")
    if not 0 < percent <= 100:
        raise ValueError(f"a threshold must be above 0 and at most 100 per cent, got {percent}")
    return MinMax if percent == 100 else partial(_MODES[mode], percent)


@dataclass
class Trial:
    """A way to choose ranges: how good the quantized model is, and its grid at each site."""

    value: float
    grids: Mapping[str, Quantize] = field(repr=False)


def attempt(
    model: nn.Module,
    data: Iterable[Any],
    evaluate: Callable[[nn.Module], float],
    **scheme: Any,
) -> Trial:
    """Quantize a copy of the model and measure it; `scheme` holds arguments of `quantize`."""
    quantized = quantize(copy.deepcopy(model), data=data, **scheme)
    grids = {site: quantizer.forward for site, quantizer in sites_of(quantized).items()}
    return Trial(evaluate(quantized), grids)


@dataclass
class SiteErrors:
    """What some grids do to the tensor of one site."""

    split: list[ErrorSplit]  # one per trial
    divergence: list[float]  # nats


def site_errors(
    quantized: nn.Module,
    data: Iterable[Any],
    surveys: Mapping[str, SiteSurvey],
    trials: Iterable[Trial],
) -> dict[str, SiteErrors]:
    """Return, for each surveyed site, the error of each trial's grid, in one float pass."""
    grids = {site: [trial.grids[site] for trial in trials] for site in surveys}
    splits = {site: [ErrorSplit()] * len(grids[site]) for site in surveys}
    counts: dict[str, Tensor] = {}

    def see(site: str, x: Tensor) -> None:
        if site in surveys:
            found = surveys[site]
            added = histogram(x, found.low, found.high)
            counts[site] = counts[site] + added if site in counts else added
            pairs = zip(splits[site], grids[site], strict=True)
            splits[site] = [total + split_error(x, grid) for total, grid in pairs]

    watch(quantized, data, see)
    device = next(quantized.parameters()).device
    return {
        site: SiteErrors(
            splits[site],
            [divergence(counts[site], one.low, one.high, grid, device) for grid in grids[site]],
        )
        for site, one in surveys.items()
    }
