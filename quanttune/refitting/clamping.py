"""The ranges that a model's sums can be clamped to while its answers stay."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from ..masks import Mask
from ..quantization.running import main_output
from ..quantization.token_mask import counting, without_padding
from .route import Route
from .stops import Stop, Stops, stopping_modules

Clamp = float | Mapping[str, float] | None  # of all sums; by patterns; measured

STEP = 2**0.25  # between two multiples that are tried
NARROWEST = 1.0


def clamps_of(
    model: nn.Module,
    batch: Any,
    mask: Mask | None,
    route: Route,
    clamp: Clamp,
    tolerance: float,
) -> dict[str, float]:
    """Return the range of each sum, by the module that goes into it; those that are missing have
    none.
    """
    if isinstance(clamp, Mapping):
        matches = {
            name: limit
            for name in route.scales
            for pattern, limit in clamp.items()
            if fnmatchcase(name, pattern)
        }
        if not matches:
            raise ValueError(
                f"clamp: no sum is one of {', '.join(clamp)}: there are "
                f"{', '.join(sorted(route.scales)[:3]) or 'none'}"
            )
        return matches
    if clamp is not None:
        return dict.fromkeys(route.scales, float(clamp))
    multiple = narrowest(model, batch, mask, route, tolerance)
    return {name: multiple * scale for name, scale in route.scales.items()}


@torch.no_grad()
def narrowest(
    model: nn.Module, batch: Any, mask: Mask | None, route: Route, tolerance: float
) -> float:
    """Return the smallest multiple of the root mean squares that leaves a model's output as it is.

    Within `tolerance`: the norm of the difference over that of the output.
    """
    expected, multiple = _output(model, batch, mask, route, torch.inf), route.reach
    while multiple > NARROWEST:
        difference = _output(model, batch, mask, route, multiple / STEP) - expected
        if not difference.norm() <= tolerance * expected.norm():
            return multiple
        multiple /= STEP
    return multiple


def _output(
    model: nn.Module, batch: Any, mask: Mask | None, route: Route, multiple: float
) -> Tensor:
    def clamp(stop: Stop) -> Tensor:
        if stop.other is None:
            return stop.output
        limit = multiple * route.scales[stop.name]
        return (stop.output + stop.other).clamp(-limit, limit) - stop.other

    names = stopping_modules(model, route.scales)
    with Stops(names, route.scales, clamp), counting(model, batch, mask) as (args, kwargs):
        return without_padding(main_output(model(*args, **kwargs)), "output").double()
