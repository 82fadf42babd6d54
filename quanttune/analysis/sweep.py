"""Quality against the saturation threshold (Fig. 3 of the paper) and the calibrator (Fig. 5)."""

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..quantization.calibrators import Calibrator, Percentile
from ..quantization.simulation import quantize
from ..quantization.token_mask import select
from .errors import ErrorSplit, Quantize, divergence, histogram, split_error
from .probes import sites_of, watch
from .survey import SiteSurvey

THRESHOLDS = (99.9, 99.99, 99.994, 99.999, 99.9999, 100.0)


# thresholds that have a name among the calibrators, whose trial serves for both
_NAMES = {99.9: "percentile", 100: "minmax"}


def threshold(percent: float) -> str | Callable[[], Calibrator]:
    """Return a calibrator that leaves `percent` of the values untouched.

    The paper speaks of the range, but its 99.999 % makes sense only as a quantile of the values: in
    each batch, the mean over the batches. 100 covers everything that was seen.
    """
    if not 0 < percent <= 100:
        raise ValueError(f"a threshold must be above 0 and at most 100 per cent, got {percent}")
    return _NAMES.get(percent) or partial(Percentile, percent)


@dataclass
class Trial:
    """A quantized model: how good it is, and its grid at each site."""

    value: float
    grids: Mapping[str, Quantize] = field(repr=False)

    @classmethod
    def of(cls, quantized: nn.Module, evaluate: Callable[[nn.Module], float]) -> "Trial":
        grids = {site: quantizer.round for site, quantizer in sites_of(quantized).items()}
        return cls(evaluate(quantized), grids)


class Trials:
    """One model with each of several calibrators. Each is tried once, when it is first asked for.

    `scheme` holds arguments of `quantize`. `minmax` is the model that is quantized with min-max.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Iterable[Any],
        evaluate: Callable[[nn.Module], float],
        **scheme: Any,
    ) -> None:
        self._model, self._data, self._evaluate, self._scheme = model, data, evaluate, scheme
        self.minmax = self._quantize("minmax")
        self._trials: dict[Any, Trial] = {}

    def __getitem__(self, calibrator: str | Callable[[], Calibrator]) -> Trial:
        if calibrator not in self._trials:
            is_minmax = calibrator == "minmax"
            quantized = self.minmax if is_minmax else self._quantize(calibrator)
            self._trials[calibrator] = Trial.of(quantized, self._evaluate)
        return self._trials[calibrator]

    def _quantize(self, calibrator: str | Callable[[], Calibrator]) -> nn.Module:
        model = copy.deepcopy(self._model)
        return quantize(model, data=self._data, calibrator=calibrator, **self._scheme)


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

    def see(site: str, x: Tensor, counted: Tensor | None) -> None:
        if site in surveys:
            x = select(x, counted)
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
