"""The fields of a described model, and the check that there are no others.

The names are those of compressed-tensors. `config_groups` are modules that have the same grids. It
has no name for `parameter_groups`, parameters of modules that multiply with several (experts,
MultiheadAttention), for `operation_groups`, functional sites, for `call_groups`, the places in
modules' code that these stand at (places.py) or that stay in float, for `restorations`, LayerNorms
that were equalized for the modules they are listed with, for `prefix`, the tokens whose keys and
values a decoder keeps, for `corrections`, ranks of what Linear modules add in float, for
`outliers`, how many weights stay in float among codes, and for `grid_groups`, sites whose grids are
not uniform (other_grids.py); only models that have such have the last four. `scheme` is what
`quantize` was asked for. What is not `symmetric` has its zero point among the tensors, beside its
scale. Weights are stored in float ("dense"), so that a loaded model can be trained on.
"""

import re
from collections import Counter
from collections.abc import Iterable
from types import NoneType
from typing import Any

from ...fake_quantizer import integer_range
from ..coverage import PRESETS
from ..other_grids import GRIDS

METHOD = "quanttune"
VERSION = "3"  # 2: queries are scaled before they are rounded; methods. 3: places, parameters
FIXED = {
    "quant_method": METHOD, "version": VERSION, "format": "dense", "quantization_status": "frozen",
}  # fmt: skip
SCHEME = ("bits", "weight_bits", "coverage", "weights", "residual", "overrides", "methods")
PARTS = {
    "weight_quantizer": "weights",
    "input_quantizer": "input_activations",
    "output_quantizer": "output_activations",
}
ARGUMENTS = ("num_bits", "type", "symmetric", "strategy", "dynamic", "observer")
GROUP_SIZE = "group_size"  # beside them where the strategy is "group"
_VALUES: dict[str, list[Any]] = {
    "type": ["int"], "symmetric": [True, False], "strategy": ["tensor"], "dynamic": [True, False],
}  # fmt: skip
LEARNED = ("lsq", "lsq+", "pact")  # observers: the range is being learned
SQUASHED = "dorefa"  # an observer of weights: they go through a tanh
_VALUES_OF_WEIGHTS = {
    **_VALUES, "symmetric": [True], "strategy": ["tensor", "channel", "group"], "dynamic": [False],
    "observer": ["minmax", LEARNED[0], SQUASHED, None],  # None: a constant scale
}  # fmt: skip
_GROUPS = {
    "config_groups": tuple(PARTS.values()), "parameter_groups": ("weights",),
    "operation_groups": ("kind", "activations"),
}  # fmt: skip
MOST_CHANNELS = 2**20  # of a file that may be anybody's: they are allocated before it is read
OPERATION = re.compile(r"(.+\.)?(attention|product|linear|add)\d+(_[a-z]+)?_quantizer")
_OPERATION_FIELDS: dict[str, tuple[type, ...]] = {
    "name": (str, NoneType), "kinds": (dict,), "weight": (int, NoneType),
    "owner": (str, NoneType), "parameter": (str, NoneType), "is_score": (bool,),
}  # fmt: skip
_KINDS = {*PRESETS["full"], "weight"}


def check(data: Any) -> None:
    """Refuse what `describe` does not return.

    Raises:
        ValueError: a field is unknown, is missing or holds something else; it says which.
    """
    names = [*FIXED, "scheme", *_GROUPS, "call_groups", "restorations"]
    if isinstance(data, dict) and data.get("version", VERSION) != VERSION:
        raise ValueError(
            f"version must be {VERSION!r}, got {data['version']!r}: quantize the float model again"
        )
    if isinstance(data, dict) and "prefix" in data:  # what has none is as before there were any
        names.append("prefix")
        _check_prefix(data["prefix"])
    if isinstance(data, dict) and "corrections" in data:
        names.append("corrections")
        _check_counts(data["corrections"], "corrections", "a rank from 1")
    if isinstance(data, dict) and "outliers" in data:
        names.append("outliers")
        _check_counts(data["outliers"], "outliers", "a number from 1")
    if isinstance(data, dict) and "grid_groups" in data:
        names.append("grid_groups")
        _check_grids(data["grid_groups"])
    _check_fields(data, names, "the quantization")
    for name, value in FIXED.items():
        if data[name] != value:
            raise ValueError(f"{name} must be {value!r}, got {data[name]!r}")
    _check_scheme(data["scheme"])
    for name, parts in _GROUPS.items():
        _check_fields(data[name], data[name], name)  # any keys
        for key, group in data[name].items():
            _check_group(group, parts, f"{name}.{key}")
        _check_once(data[name], name)
    _check_fields(data["call_groups"], data["call_groups"], "call_groups")
    for key, group in data["call_groups"].items():
        _check_calls(group, f"call_groups.{key}")
    _check_fields(data["restorations"], data["restorations"], "restorations")
    for name, readers in data["restorations"].items():
        _check_names(readers, f"restorations.{name}")


def _check_prefix(data: Any) -> None:
    _check_fields(data, ("tokens",), "prefix")
    tokens = data["tokens"]
    if not (tokens and isinstance(tokens, list) and all(type(x) is int and x >= 0 for x in tokens)):
        raise ValueError(f"prefix.tokens must be a list of token ids, got {tokens!r}")


def _check_counts(data: Any, where: str, wanted: str) -> None:
    _check_fields(data, data, where)  # any names
    for name, count in data.items():
        if type(count) is not int or count < 1:
            raise ValueError(f"{where}.{name} must be {wanted}, got {count!r}")


def _check_grids(data: Any) -> None:
    _check_fields(data, data, "grid_groups")  # any keys
    for key, group in data.items():
        where = f"grid_groups.{key}"
        _check_fields(group, ("targets", "grid", "channels"), where)
        _check_names(group["targets"], f"{where}.targets")
        if not (isinstance(group["grid"], str) and group["grid"] in GRIDS):
            raise ValueError(f"{where}.grid must be of {', '.join(GRIDS)}, got {group['grid']!r}")
        channels = group["channels"]
        if type(channels) is not int or not 1 <= channels <= MOST_CHANNELS:
            raise ValueError(f"{where}.channels must be a whole number of channels, got {channels}")


def _check_scheme(data: Any) -> None:
    _check_fields(data, SCHEME, "scheme")
    _check_names(data["methods"], "scheme.methods")
    _check_bits(data["bits"], "scheme.bits")
    if data["weight_bits"] is not None:
        _check_bits(data["weight_bits"], "scheme.weight_bits")
    if type(data["residual"]) is not bool:
        raise ValueError(f"scheme.residual must be true or false, got {data['residual']!r}")
    _check_fields(data["overrides"], data["overrides"], "scheme.overrides")
    for pattern, override in data["overrides"].items():
        if override is not None:
            _check_fields(override, ("bits",), f"scheme.overrides.{pattern}")
            _check_bits(override["bits"], f"scheme.overrides.{pattern}.bits")


def _check_once(groups: dict[str, Any], where: str) -> None:
    counts = Counter(target for group in groups.values() for target in group["targets"])
    if twice := [target for target, count in counts.items() if count > 1]:
        raise ValueError(f"{where} have the target {twice[0]!r} more than once")


def _check_group(group: Any, parts: tuple[str, ...], where: str) -> None:
    _check_fields(group, ("targets", *parts), where)
    _check_names(group["targets"], f"{where}.targets")
    for part in parts:
        if part == "kind":
            # null where an override leaves the activations in float
            _check_kinds([] if group[part] is None else [group[part]], f"{where}.{part}")
        else:
            of_weights = part == "weights" or group.get("kind") == "weight"
            values = _VALUES_OF_WEIGHTS if of_weights else _VALUES
            _check_arguments(group[part], f"{where}.{part}", values)


def _check_calls(group: Any, where: str) -> None:
    _check_fields(group, ("targets", "operations"), where)
    _check_names(group["targets"], f"{where}.targets")
    operations = group["operations"]
    _check_fields(operations, operations, f"{where}.operations")  # any places
    for way, operation in operations.items():
        _check_fields(operation, _OPERATION_FIELDS, f"{where}.operations.{way}")
        for name, types in _OPERATION_FIELDS.items():
            if type(operation[name]) not in types:
                raise ValueError(f"{where}.operations.{way}.{name} is {operation[name]!r}")
        _check_kinds(list(operation["kinds"].values()), f"{where}.operations.{way}.kinds")
        if operation["weight"] not in (None, 0, 1):
            raise ValueError(f"{where}.operations.{way}.weight must be 0 or 1, or null")


def _check_fields(data: Any, names: Iterable[str], where: str) -> None:
    if not isinstance(data, dict):
        raise ValueError(f"{where} must be an object, got {type(data).__name__}")
    if unknown := sorted({*data} - {*names}):
        raise ValueError(f"{where} has unknown field(s) {', '.join(unknown)}: a newer version's?")
    if missing := sorted({*names} - {*data}):
        raise ValueError(f"{where} lacks {', '.join(missing)}")


def _check_arguments(data: Any, where: str, values_of: dict[str, list[Any]]) -> None:
    if data is None:
        return
    is_group = isinstance(data, dict) and data.get("strategy") == "group"
    _check_fields(data, (*ARGUMENTS, GROUP_SIZE) if is_group else ARGUMENTS, where)
    _check_bits(data["num_bits"], f"{where}.num_bits")
    for name, values in values_of.items():
        # of the same type: 1 is no true
        if not any(type(data[name]) is type(value) and data[name] == value for value in values):
            raise ValueError(f"{where}.{name} must be one of {values}, got {data[name]!r}")
    _check_text(data["observer"], f"{where}.observer")


def _check_bits(data: Any, where: str) -> None:
    if type(data) is not int:
        raise ValueError(f"{where} must be a whole number, got {data!r}")
    integer_range(data)


def _check_names(data: Any, where: str) -> None:
    if not (isinstance(data, list) and all(isinstance(name, str) for name in data)):
        raise ValueError(f"{where} must be a list of names, got {data!r}")


def _check_kinds(data: list[Any], where: str) -> None:
    for kind in data:
        if not (isinstance(kind, str) and kind in _KINDS):
            raise ValueError(f"{where} must be of {', '.join(sorted(_KINDS))}, got {kind!r}")


def _check_text(data: Any, where: str) -> None:
    if not isinstance(data, str | None):
        raise ValueError(f"{where} must be a name or null, got {data!r}")
