"""Weights that stay in float among the codes of a Linear: where they are, and what they are."""

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from .modules import inputs_of
from .state import state_of, weight_quantizers


class Outliers(nn.Module):
    """Takes the places of some elements of a weight, after the others were rounded."""

    positions: Tensor  # int64 (outliers,), ascending, in the flat weight

    def __init__(self, positions: Tensor, values: Tensor) -> None:
        super().__init__()
        self.register_buffer("positions", positions)
        self.values = nn.Parameter(values.float())  # a float16 would not train

    def put_into(self, weight: Tensor) -> Tensor:
        """Return a weight with the outliers in their places."""
        values = self.values.to(weight.dtype)
        return weight.flatten().index_copy(0, self.positions, values).view_as(weight)


def check_share(share: float) -> None:
    """Refuse a share of outliers that is none, or all."""
    if not 0 < share < 1:
        raise ValueError(f"share must be between 0 and 1, got {share!r}")


def largest_of(scores: Tensor, share: float) -> Tensor:
    """Return the positions of the largest scores, at least one, ascending."""
    count = max(1, round(share * scores.numel()))
    return scores.flatten().topk(count).indices.sort().values


def outliers_in(model: nn.Module) -> dict[str, Outliers]:
    """Return the outliers of a model's weights by the names of their quantizers."""
    found = {name: one.outliers for name, (_, one) in weight_quantizers(model).items()}
    return {name: one for name, one in found.items() if isinstance(one, Outliers)}


def learn_outliers(model: nn.Module, also: Iterable[str] = ()) -> list[nn.Parameter]:
    """Leave nothing to train but the outliers of a model's weights, in place, and return them.

    All other parameters stop requiring gradients, so that any trainer steps these alone. Codes and
    positions stay as they are.

    Args:
        also: patterns (fnmatch) of parameters that are trained besides, such as "classifier.*",
            whose weights are rounded nevertheless.

    Raises:
        ValueError: the model has no outliers, or a pattern matches no parameter.

    Source: Gong et al., PreQuant, arXiv 2306.00014.
    """
    state_of(model)
    found = outliers_in(model)
    if not found:
        raise ValueError(
            f'{type(model).__name__} keeps no outliers: quantize it with methods=["prequant"]'
        )
    chosen = {id(one.values) for one in found.values()}
    names = {n: p for n, p in model.named_parameters() if not n.endswith(".outliers.values")}
    for pattern in also:
        matching = [p for name, p in names.items() if fnmatchcase(name, pattern)]
        if not matching:
            raise ValueError(f"also has {pattern!r}, which matches no parameter of the model")
        chosen |= {id(p) for p in matching}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in chosen)
    return [p for p in model.parameters() if id(p) in chosen]


def described_outliers(model: nn.Module) -> dict[str, Any]:
    """Return what a description says of outliers, how many: nothing, if there are none."""
    counts = {name: len(one.positions) for name, one in outliers_in(model).items()}
    return {"outliers": counts} if counts else {}


def add_described_outliers(model: nn.Module, counts: Mapping[str, int]) -> None:
    """Give a model the outliers of another, whose places and values are loaded later.

    Raises:
        ValueError: the model rounds no such weight of a Linear, or it holds fewer numbers.
    """
    known = weight_quantizers(model)
    for name, count in counts.items():
        holder, one = known.get(name, (None, None))
        if one is None or inputs_of(holder) is None:
            raise ValueError(f"outliers: {name!r} rounds no weight of a Linear or Conv1D")
        weight: Any = holder.weight  # type: ignore[union-attr]
        if count > weight.numel():
            raise ValueError(f"outliers: {name!r} has {weight.numel()} weights, got {count}")
        positions = torch.zeros(count, dtype=torch.int64, device=weight.device)
        one.outliers = Outliers(positions, torch.zeros(count, device=weight.device))


def check_outliers(model: nn.Module) -> None:
    """Check what was loaded.

    Raises:
        ValueError: a position is none of the weight, or is there twice; or a value is not finite.
    """
    for name, one in outliers_in(model).items():
        positions, weight = one.positions, weight_quantizers(model)[name][0].weight
        ascending = bool((positions.diff() > 0).all())
        if not ascending or positions[0] < 0 or positions[-1] >= weight.numel():
            raise ValueError(f"{name}.outliers.positions must ascend within the weight")
        if not one.values.isfinite().all():
            raise ValueError(f"{name}.outliers.values must be finite")
