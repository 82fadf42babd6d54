"""What a quantized model is, as plain data: to JSON, and from JSON that may be anybody's."""

import json
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from ..convert import convert
from ..correction import add_described_corrections, described_corrections, drop_corrections
from ..functional.functional_sites import FunctionalSites
from ..functional.operations import Operation
from ..grid import check_scale
from ..modules import QuantizedLinear
from ..other_grids import add_described_grids, described_grids
from ..outliers import add_described_outliers, check_outliers, described_outliers
from ..prefixes.decoder import add_described_prefix, described_prefix
from ..quantizer import ActivationQuantizer, WeightQuantizer
from ..restoration import add_described, described_restorations, drop_restorations, restorations
from ..row_quantizers import GroupQuantizer
from ..scheme import DYNAMIC, Scheme
from ..state import quantizers, state_of, weight_quantizers
from .schema import ARGUMENTS, FIXED, GROUP_SIZE, LEARNED, OPERATION, PARTS, SCHEME, SQUASHED, check


def describe(model: nn.Module) -> dict[str, Any]:
    """Return what a quantized model is, all but its tensors.

    Raises:
        ValueError: the model is not quantized.
    """
    scheme = state_of(model).scheme
    modules: dict[str, dict[str, Any]] = {}
    parameters: dict[str, dict[str, Any]] = {}
    operations: dict[str, dict[str, Any]] = {}
    weights = weight_quantizers(model)
    for site, arguments in _arguments(model).items():
        owner, _, name = site.rpartition(".")
        if part := PARTS.get(name):
            modules.setdefault(owner, dict.fromkeys(PARTS.values()))[part] = arguments
        elif site in weights:
            parameters[site.removesuffix("_quantizer")] = {"weights": arguments}
        else:
            kind = _kind_of(model.get_submodule(site))
            operations[site] = {"kind": kind, "activations": arguments}
    return {
        **FIXED,
        "scheme": json.loads(json.dumps({name: getattr(scheme, name) for name in SCHEME})),
        "config_groups": _grouped(modules),
        "parameter_groups": _grouped(parameters),
        "operation_groups": _grouped(operations),
        "call_groups": _grouped(_calls(model)),
        "restorations": described_restorations(model),
        **_described_grids(model),
        **described_prefix(model),
        **described_corrections(model),
        **described_outliers(model),
    }


def _described_grids(model: nn.Module) -> dict[str, Any]:
    """Return the grids that are not uniform, which few models have."""
    found = described_grids(quantizers(model))
    return {"grid_groups": _grouped(found)} if found else {}


def from_description(model: nn.Module, data: Any, undo: ExitStack) -> None:
    """Put described quantizers into a float model; `check_loaded` follows when scales are loaded.

    Raises:
        ValueError: the description is not one, or is that of another model.
    """
    check(data)
    sites = described_sites(data)
    dynamic = any(arguments and arguments["dynamic"] for arguments in sites.values())
    symmetric = all(arguments["symmetric"] for arguments in sites.values() if arguments)
    rules: dict[str, Any] = {"calibrator": DYNAMIC if dynamic else "minmax", "symmetric": symmetric}
    try:
        scheme = Scheme(**data["scheme"], **rules)
    except TypeError as error:
        raise ValueError(f"scheme holds a value of another type: {error}") from error
    state = convert(model, scheme, undo)
    undo.callback(drop_restorations, model)
    add_described(model, data["restorations"])
    add_described_prefix(model, data.get("prefix"), undo)
    undo.callback(drop_corrections, model)
    add_described_corrections(model, data.get("corrections", {}))
    state.frozen = not dynamic
    _register(state, data["call_groups"])
    _compare(_arguments(model), sites, model)
    add_described_grids(model, quantizers(model), data.get("grid_groups", {}))
    _compare_kinds(model, data["operation_groups"])
    for name, quantizer in quantizers(model).items():
        if sites[name]["symmetric"] != symmetric:
            raise ValueError(f"{name} is symmetric, and other activations are not")
        quantizer.calibrator = None
        quantizer.bits, quantizer.observer = sites[name]["num_bits"], sites[name]["observer"]
        quantizer.dynamic = sites[name]["dynamic"]
        if quantizer.observer in LEARNED:
            how, quantizer.observer = quantizer.observer, None
            quantizer.learn(how)
    for name, (module, weight) in weight_quantizers(model).items():
        weight.bits = sites[name]["num_bits"]
        _set_granularity(name, weight, sites[name], module.output_axis)
        if sites[name]["observer"] == SQUASHED:
            weight.squash(module.weight)
        elif sites[name]["observer"] != "minmax":  # it has scales of its own
            shape = weight.scales_in(module.weight)
            weight.scale = module.weight.new_ones(shape, dtype=torch.float32)
        if sites[name]["observer"] in LEARNED:
            weight.learn(weight.scale)
    add_described_outliers(model, data.get("outliers", {}))


def check_loaded(model: nn.Module) -> None:
    """Check the scales of a restored model, and note which sites were calibrated.

    Raises:
        ValueError: a scale is not finite and positive, or a zero point is no code.
    """
    for name, quantizer in quantizers(model).items():
        quantizer.check_loaded(name)
    for name, (_, weight) in weight_quantizers(model).items():
        if weight.scale is not None:
            check_scale(name, weight.scale)
            check_scale(name, weight.step)
        if weight.top is not None and not (weight.top.isfinite() and weight.top >= 0):
            raise ValueError(f"{name}.top must be a magnitude, got {weight.top}")
    check_outliers(model)
    for name, restoration in restorations(model).items():
        check_scale(f"{name}.restoration", restoration.scale)
        if not restoration.shift.isfinite().all():
            raise ValueError(f"{name}.restoration.shift must be finite")


def _arguments(model: nn.Module) -> dict[str, dict[str, Any] | None]:
    """Return every site's QuantizationArgs; None for functional sites that stay in float."""
    found: dict[str, Any] = {}
    weights = weight_quantizers(model)
    for name, module in model.named_modules():
        if isinstance(module, ActivationQuantizer):
            observer = module.learned_by or module.observer
            grid = module.bits, module.symmetric, "tensor"
            found[name] = _values(*grid, module.dynamic, observer)
        elif name in weights:
            _, weight = weights[name]
            observer = weight.learned_by or ("minmax" if weight.scale is None else None)
            found[name] = _values(weight.bits, True, weight.granularity, False, observer)
            if isinstance(weight, GroupQuantizer):
                found[name][GROUP_SIZE] = weight.size
        elif isinstance(module, WeightQuantizer) and OPERATION.fullmatch(name):
            found[name] = _values(module.bits, True, module.granularity, False, "minmax")
        elif isinstance(module, nn.Identity) and OPERATION.fullmatch(name):
            found[name] = None
    return found


def _set_granularity(site: str, weight: WeightQuantizer, described: Any, outputs: int) -> None:
    """Give a quantizer the granularity that is described; groups it has as its scheme says."""
    size = weight.size if isinstance(weight, GroupQuantizer) else None
    if described.get(GROUP_SIZE) != size:
        raise ValueError(f"{site} has groups of {described.get(GROUP_SIZE)}, its scheme {size}")
    if size is None:
        weight.axis = outputs if described["strategy"] == "channel" else None


def _kind_of(quantizer: nn.Module) -> str | None:
    return "weight" if isinstance(quantizer, WeightQuantizer) else getattr(quantizer, "kind", None)


def _calls(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return what each module calls, by the way there; also what stays in float."""
    # not those under which it was quantized, before adapters were merged
    names = {module: name for name, module in model.named_modules()}
    return {
        names[module]: {"operations": {way: o.as_dict() for way, o in calls.operations.items()}}
        for module, calls in state_of(model).calls()
        if calls.operations and module in names
    }


def _register(state: FunctionalSites, groups: Mapping[str, Any]) -> None:
    watched = {calls.module: module for module, calls in state.calls()}
    parameters = dict(state.modules[""].named_parameters(remove_duplicate=False))
    for group in groups.values():
        for target in group["targets"]:
            # what is missing, `_compare` tells
            for way, operation in group["operations"].items() if target in watched else ():
                _check_operation(operation, watched[target], parameters, f"{target}: {way}")
                state.register(watched[target], way, Operation(**operation))


def _check_operation(
    operation: Mapping[str, Any], module: nn.Module, parameters: Mapping[str, Any], where: str
) -> None:
    """Refuse an operation of weights that the model does not hold."""
    parameter, owner = operation["parameter"], operation["owner"]
    if parameter is not None and parameter not in parameters:
        raise ValueError(f"call_groups: {where}: the model has no parameter {parameter!r}")
    if owner is not None and not isinstance(
        dict(module.named_modules()).get(owner), QuantizedLinear
    ):
        raise ValueError(f"call_groups: {where}: there is no quantized Linear {owner!r}")


def _values(*values: Any) -> dict[str, Any]:
    bits, *others = values
    return dict(zip(ARGUMENTS, (bits, "int", *others), strict=True))


def _grouped(table: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    groups: dict[str, Any] = {}
    for target, values in sorted(table.items()):
        group = groups.setdefault(json.dumps(values, sort_keys=True), {"targets": [], **values})
        group["targets"].append(target)
    return {f"group_{i}": group for i, group in enumerate(groups.values())}


def described_sites(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the QuantizationArgs of each site of a description."""
    sites = {}
    for group in data["config_groups"].values():
        for target in group["targets"]:
            for name, part in PARTS.items():
                if group[part] is not None:
                    sites[f"{target}.{name}".lstrip(".")] = group[part]
    for group in data["parameter_groups"].values():
        for target in group["targets"]:
            if group["weights"] is None:
                raise ValueError(f"parameter_groups: {target!r} has no weights")
            sites[f"{target}_quantizer"] = group["weights"]
    for group in data["operation_groups"].values():
        for target in group["targets"]:
            if not OPERATION.fullmatch(target):
                raise ValueError(f"operation_groups: {target!r} is no name of a functional site")
            sites[target] = group["activations"]
    return sites


def _compare(found: Mapping[str, Any], described: Mapping[str, Any], model: nn.Module) -> None:
    missing = [name for name in found if name not in described]
    unknown = [name for name, arguments in described.items() if name not in found]
    unknown += [n for n in found if n in described and (found[n] is None) != (described[n] is None)]
    if missing or unknown:
        raise ValueError(
            f"the quantization is that of another model than this {type(model).__name__}: "
            f"it does not say {_some(missing)}, and the model has no {_some(unknown)}"
        )


def _compare_kinds(model: nn.Module, groups: Mapping[str, Any]) -> None:
    """Refuse operations that are of one kind where they are called and of another as sites."""
    for group in groups.values():
        for target in group["targets"]:
            kind = _kind_of(model.get_submodule(target))
            if group["kind"] != kind:
                raise ValueError(
                    f"operation_groups: {target!r} is of the kind {group['kind']!r}, and of "
                    f"{kind!r} in call_groups"
                )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "") or "more"
