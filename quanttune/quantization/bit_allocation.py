"""Widths of weights, layer by layer, under a budget: more bits where rounding would cost more."""

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..fake_quantizer import integer_range
from ..masks import Mask
from ..progress import Progress, silent
from .methods.rounding.layers import Layer
from .methods.rounding.moments import Moments, groups_of, passes, sums_of
from .running import Data, evaluating, in_float
from .simulation import quantize
from .state import refuse_quantized, weight_quantizers

UNITS = 2**16  # that a budget is cut into, at most; a layer's size is rounded up to them


@torch.no_grad()
def allocate_bits(
    model: nn.Module,
    bits: float,
    *,
    choices: Sequence[int] = (4, 5, 6, 7, 8),
    weights: str | int = "channel",
    data: Iterable[Any],
    mask: Mask | None = "attention_mask",
    progress: Progress = silent,
) -> dict[str, dict[str, int]]:
    """Return a width for the weight of each Linear and Conv1D, as `overrides` of `quantize`.

    Of all choices that keep within the budget it is the one whose costs add up to the least. The
    cost of a layer is the nuclear norm of what it returns on `data`, times the squared error there
    once its weight is rounded to nearest. The model stays as it is. Weights that are shared, and
    those of convolutions, embeddings and experts, get no width, and do not count.

    Args:
        model: a float model.
        bits: the budget, as the mean width of a number of these weights. Scales do not count.
        choices: widths to choose from, 2 to 16.
        weights, mask, progress: as of `quantize`.
        data: batches of inputs, which are read several times.

    Raises:
        ValueError: an argument does not fit, the model is quantized, or no layer is reached.

    Source: Liu et al., Post-Training Quantization for Vision Transformer, arXiv 2106.14156, section
    3.4, who choose activations' widths too. That sums are compared by dynamic programming is ours.
    """
    _check(bits, choices, data)
    refuse_quantized(model)
    rounded = copy.deepcopy(model)
    quantize(rounded, coverage="weight_only", calibrator="dynamic", weights=weights)
    found = Data(data, mask, progress)
    with ExitStack() as undo:
        undo.enter_context(in_float(rounded))
        undo.enter_context(evaluating(rounded))
        costs = _costs_of(rounded, found, choices)
    sizes = [layer.module.weight.numel() for layer in costs]
    chosen = cheapest([*costs.values()], sizes, choices, int(bits * sum(sizes)))
    names = {id(holder): name for name, (holder, _) in weight_quantizers(rounded).items()}
    return {
        names[id(layer.module)]: {"bits": width} for layer, width in zip(costs, chosen, strict=True)
    }


def _check(bits: float, choices: Sequence[int], data: Iterable[Any]) -> None:
    if not choices or any(type(width) is not int or not 2 <= width <= 16 for width in choices):
        raise ValueError(f"choices must be whole numbers from 2 to 16, got {choices!r}")
    if not min(choices) <= bits <= 16:
        raise ValueError(
            f"bits must be from {min(choices)}, the least of choices, to 16, got {bits!r}"
        )
    if iter(data) is data:
        raise ValueError(
            "data are read several times: they need to be a list or a DataLoader of input batches, "
            f"got {type(data).__name__}"
        )


def _costs_of(model: nn.Module, data: Data, choices: Sequence[int]) -> Mapping[Layer, list[float]]:
    """Return what each width of each layer costs."""
    costs = {}
    for groups in passes(groups_of(model, data, "finding layers"), 1):
        sums = sums_of(model, groups, data, Moments, "what layers are given")
        for group, moments in zip(groups, sums, strict=True):
            for layer in group.layers:
                norm = nuclear_norm(layer, moments.gram)
                costs[layer] = [norm * error(layer, width, moments.of_inputs) for width in choices]
    return costs


def nuclear_norm(layer: Layer, gram: Tensor) -> float:
    """Return the sum of the singular values of what a layer returns.

    gram: of its inputs and a channel of ones, float64 (inputs + 1, inputs + 1).
    """
    bias = layer.module.bias
    column = layer.rows.new_zeros(len(layer.rows)) if bias is None else bias.detach().double()
    values, vectors = torch.linalg.eigh(gram)
    root = values.clamp_min(0).sqrt()[:, None] * vectors.T  # root.T @ root is gram
    rows = torch.cat([layer.rows, column[:, None]], 1)
    return float(torch.linalg.svdvals(root @ rows.T).sum())


def error(layer: Layer, bits: int, gram: Tensor) -> float:
    """Return the squared error of what a layer returns if its weight has so many bits."""
    rows = layer.rows
    grid = layer.grid(rows)
    ratio = integer_range(grid.bits)[1] / integer_range(bits)[1]
    errors = rows - replace(grid, scale=grid.scale * ratio, bits=bits).nearest(rows)
    return float(((errors @ gram) * errors).sum())


def cheapest(
    costs: Sequence[Sequence[float]], sizes: Sequence[int], choices: Sequence[int], budget: int
) -> list[int]:
    """Return a width for each layer, so that costs add up to the least within a budget of bits.

    Raises:
        ValueError: the smallest widths are more than the budget.
    """
    unit = max(math.gcd(*sizes), -(-budget // UNITS))
    room = budget // unit
    best = torch.zeros(room + 1, dtype=torch.float64)  # the least cost, by the units that are left
    taken = []
    for cost, size in zip(reversed(costs), reversed(sizes), strict=True):
        ways = torch.full((len(choices), room + 1), math.inf, dtype=torch.float64)
        for way, width in zip(range(len(choices)), choices, strict=True):
            needed = -(-size * width // unit)
            if needed <= room:
                ways[way, needed:] = best[: room + 1 - needed] + cost[way]
        best, way_of = ways.min(0)
        taken.append(way_of)
    if best[room].isinf():
        raise ValueError(f"{budget} bits are too few for {len(sizes)} layers")
    widths = []
    for way_of, size in zip(reversed(taken), sizes, strict=True):
        widths.append(choices[int(way_of[room])])
        room -= -(-size * widths[-1] // unit)
    return widths
