"""What a model is called with, of a batch of data."""

import dataclasses
import inspect
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

_LABELS = {"label", "labels", "label_ids", "target", "targets", "y"}


class _Wanted(NamedTuple):
    """What a forward takes by position: how many it needs, how many it can take, their names."""

    needs: int
    takes: int
    names: tuple[str, ...]
    by_name: bool  # takes any name


def arguments_of(
    batch: Any, model: nn.Module | None = None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return what a model is called with: args and kwargs.

    A mapping or dataclass is passed as keywords, to a forward that knows none of them as it is. Of
    a tuple or list the first element is passed, and as many more as the forward cannot do without;
    the others are taken for labels. A warning says so where they could be inputs as well.

    Raises:
        ValueError: the batch is empty.
    """
    wanted = _wanted(model)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, (type, Mapping)):
        batch = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    elif isinstance(batch, tuple) and hasattr(batch, "_asdict"):
        fields = batch._asdict()
        batch = fields if fields.keys() & {*wanted.names} else tuple(batch)
    if isinstance(batch, Mapping):
        return _of_mapping(batch, wanted)
    if not isinstance(batch, (tuple, list)):
        return (batch,), {}
    if not batch:
        raise ValueError("a batch must hold inputs, got an empty " + type(batch).__name__)
    first = batch[0]
    if isinstance(first, Mapping) or dataclasses.is_dataclass(first):
        return arguments_of(first, model)
    if isinstance(first, (tuple, list)) and 1 < len(first) <= wanted.needs > len(batch) - 1:
        return tuple(first), {}  # ((a, b), labels)
    taken = max(1, min(wanted.needs, len(batch)))
    if model is not None and any(_may_be_input(batch, i, wanted) for i in range(taken, len(batch))):
        _say_what_is_taken(batch, taken, wanted, model)
    return tuple(batch[:taken]), {}


def _of_mapping(
    batch: Mapping[Any, Any], wanted: _Wanted
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    known = {*wanted.names}
    if known and not wanted.by_name and wanted.names[0] not in batch and batch.keys() - known:
        return (dict(batch),), {}  # timm's NaFlexVit takes a dictionary
    return (), dict(batch)


def _may_be_input(batch: Any, position: int, wanted: _Wanted) -> bool:
    """Tell whether an element that the forward can do without may be no label."""
    x = batch[position]
    if position >= wanted.takes or not isinstance(x, Tensor) or x.dim() < 2:
        return False
    return position >= len(wanted.names) or wanted.names[position] not in _LABELS


def _say_what_is_taken(batch: Any, taken: int, wanted: _Wanted, model: nn.Module) -> None:
    names = ", ".join(wanted.names[:taken]) or "its first argument"
    more = ", ".join(wanted.names[taken : len(batch)]) or "more"
    warnings.warn(
        f"a batch of {len(batch)} elements: {type(model).__name__} is called with the first "
        f"{taken} ({names}), and could take {more} too. The rest is left out, as labels are. Give "
        f"batches as dictionaries of all inputs by name if it is not, and without labels if it is",
        stacklevel=4,
    )


def _wanted(model: nn.Module | None) -> _Wanted:
    if model is None:
        return _Wanted(1, 1, (), True)
    try:
        parameters = list(inspect.signature(model.forward).parameters.values())
    except ValueError:  # of a script module
        return _Wanted(1, 1, (), True)
    by_position = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    needed = [p for p in by_position if p.default is p.empty]
    star = any(p.kind == p.VAR_POSITIONAL for p in parameters)
    return _Wanted(
        len(needed),
        10**6 if star else len(by_position),
        tuple(p.name for p in by_position),
        any(p.kind == p.VAR_KEYWORD for p in parameters),
    )
