"""The order in which a forward comes to its Linear modules, and which of them go into a sum."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..masks import Mask
from ..quantization.running import forward_batch
from .stops import Stop, Stops, stopping_modules


@dataclass(frozen=True)
class Route:
    """What a forward comes by; `scales` are the root mean squares of the sums, by module."""

    names: tuple[str, ...]
    summed: frozenset[str]
    scales: Mapping[str, float]


@torch.no_grad()
def route_of(model: nn.Module, batch: Any, mask: Mask | None) -> Route:
    """Return the route of a batch, without the modules that it comes to more than once."""
    names = stopping_modules(model)
    calls: Counter[str] = Counter()

    def count(stop: Stop) -> Tensor:
        calls[stop.name] += 1
        return stop.output

    with Stops(names, (), count):
        forward_batch(model, batch, mask)
    once = {key: name for key, name in names.items() if calls[name] == 1}
    scales: dict[str, float] = {}

    def measure(stop: Stop) -> Tensor:
        if stop.other is not None:
            scales[stop.name] = rms(stop.output + stop.other, stop.counted)
        return stop.output

    with Stops(once, once.values(), measure):
        forward_batch(model, batch, mask)
    order: list[str] = []

    def note(stop: Stop) -> Tensor:
        order.append(stop.name)
        return stop.output

    with Stops(once, scales, note):
        forward_batch(model, batch, mask)
    return Route(tuple(order), frozenset(scales), scales)


def rms(x: Tensor, counted: Tensor | None) -> float:
    """Return the root mean square of the tokens that count."""
    rows = x.flatten(0, -2).float()
    rows = rows if counted is None else rows[counted]
    return rows.square().mean().sqrt().item()
