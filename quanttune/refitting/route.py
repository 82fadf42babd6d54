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
    """What a forward comes by: modules in their order, and those whose output goes into a sum.

    scales: the root mean square of each sum. reach: the largest value of any, in units of its own.
    """

    names: tuple[str, ...]
    scales: Mapping[str, float]
    reach: float


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
    reaches = [1.0]

    def measure(stop: Stop) -> Tensor:
        if stop.other is not None:
            total = (stop.output + stop.other).flatten(0, -2).float()
            total = total if stop.counted is None else total[stop.counted]
            scales[stop.name] = scale = total.square().mean().sqrt().item()
            reaches.append(total.abs().max().item() / (scale or 1.0))
        return stop.output

    with Stops(once, once.values(), measure):
        forward_batch(model, batch, mask)
    order: list[str] = []

    def note(stop: Stop) -> Tensor:
        order.append(stop.name)
        return stop.output

    with Stops(once, scales, note):
        forward_batch(model, batch, mask)
    return Route(tuple(order), scales, max(reaches))
