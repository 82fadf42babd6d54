"""The last resort: tensors that hurt most stay in float, as few as meet the drop."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..analysis.probes import outputs_of, rounding_sites
from ..analysis.sensitivity import relative_error
from ..analysis.survey import survey
from ..progress import Progress, silent, track
from .search import NO_BETTER, SURELY_MET, Search
from .space import Point


def ranked_sites(
    quantized: nn.Module, batch: Any, progress: Progress = silent
) -> list[tuple[str, ...]]:
    """Return the tensors that are rounded, each as the names of its quantizers: first those that
    move the model's output most when no other is rounded.
    """
    with rounding_sites(quantized, ()):
        exact = outputs_of(quantized, [batch])
    tensors = [(site, *found.aliases) for site, found in survey(quantized, [batch]).items()]
    errors: dict[tuple[str, ...], float] = {}
    for sites in track(tensors, "finding what hurts", progress):
        with rounding_sites(quantized, sites):
            errors[sites] = relative_error(outputs_of(quantized, [batch]), exact)
    ranked = sorted(tensors, key=lambda sites: -errors[sites])
    return [tuple(f"{site}_quantizer" for site in sites) for sites in ranked]


def spare(search: Search, point: Point, ranked: Sequence[Sequence[str]]) -> str:
    """Leave the first tensors of a ranking in float: twice as many each time until the drop is met,
    then, by halves, as few as still meet it.
    """
    too_few, enough, count = 0, 0, 1
    while not enough and too_few < len(ranked):
        count = min(count, len(ranked))
        if _is_met(search, point, ranked[:count]):
            enough = count
        else:
            too_few, count = count, 2 * count
    if not enough:
        return NO_BETTER
    while enough - too_few > 1:
        middle = (enough + too_few) // 2
        if _is_met(search, point, ranked[:middle]):
            enough = middle
        else:
            too_few = middle
    search.take(_sparing(point, ranked[:enough]))
    return SURELY_MET


def _is_met(search: Search, point: Point, sites: Sequence[Sequence[str]]) -> bool:
    return search.is_surely_met(search.attempt(_sparing(point, sites)))


def _sparing(point: Point, sites: Sequence[Sequence[str]]) -> Point:
    return {**point, "overrides": {name: None for names in sites for name in names}}
