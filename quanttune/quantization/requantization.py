"""Give a quantized model another scheme without data: widths, no zero points, powers of two."""

import warnings
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..fake_quantizer import fake_quant, integer_range
from ..transaction import transaction
from .affine_quantizer import AffineQuantizer
from .calibrators import SEARCHES
from .convert import new_weight_quantizer
from .correction import corrections
from .methods.equalizing.pairs import Pair
from .methods.equalizing.readers import pairs_in
from .methods.rounding.layers import Layer, layers_of
from .other_grid import OtherGrid, put
from .powers_of_two import nearest_power_of_two, power_of_two_above
from .quantizer import ActivationQuantizer, WeightQuantizer
from .restoration import NAME
from .row_quantizers import GroupQuantizer, RowQuantizer
from .running import Data, in_float
from .saving.hf_config import update_hf_config
from .scheme import Scheme
from .state import quantizers, state_of, weight_quantizers
from .ties import snapshot


def requantize(
    model: nn.Module,
    bits: int | None = None,
    weights: str | int | None = None,
    *,
    weight_bits: int | None = None,
    symmetric: bool | None = None,
    power_of_two: bool = False,
    correct_weights: bool = False,
    example: Any = None,
) -> nn.Module:
    """Give a quantized model another scheme in place, from its ranges and weights, without data.

    Ranges stay, so that with those of min-max and percentile the model is what `quantize` makes of
    the float one. Weights that a method rounded keep their codes where the grid only gets wider;
    else they are rounded anew. Where a width is given, overrides of widths are forgotten; what they
    left in float stays in float.

    Args:
        bits: of activations and, without `weight_bits`, of weights; None keeps all widths.
        weights: "channel", "tensor" or a size of groups, as in `quantize`; None keeps it.
        weight_bits: of weights.
        symmetric: True takes zero points away: a grid then covers the farther end on both sides.
        power_of_two: make all scales powers of two, so that integers are rescaled by shifts.
            Those of activations grow, to clip nothing; a weight's is the one of two that loses
            less.
        correct_weights: round the weights of Linear and Conv1D modules so that the sum of each row
            (or group) stays, which is what an input of equal channels meets: the codes nearest to
            a tie go to the other side. Grids of weights are constant from then on.
        example: inputs of the right shapes, such as random numbers, by which the norms are found
            that nothing but Linear modules read. They take what rounding a scale to a power of two
            changes, and the weights that read them give it back: those activations keep their
            codes.

    Raises:
        ValueError: the ranges were searched for grids of another width, or are taken from each
            tensor, a method chose grids that are not uniform, scales are being learned, or a grid
            has no zero point to be given.

    Source: after Manohara et al., MRQ, arXiv 2308.01867, which says what is to be corrected; how it
    is done here is ours.
    """
    state = state_of(model)
    scheme = _scheme_of(state.scheme, bits, weight_bits, weights, symmetric)
    _check(model, scheme, bits, symmetric, power_of_two)
    with transaction(model, snapshot(model), partial(update_hf_config, model)) as undo:
        undo.callback(setattr, state, "scheme", state.scheme)
        pairs = _pairs(model, example) if power_of_two and example is not None else []
        for site, one in quantizers(model).items():
            _regrid(model, site, one, bits, symmetric)
        for pair in pairs:
            _fold(pair)
        for one in quantizers(model).values():
            if power_of_two and one.calibrated:
                one.set_scale(power_of_two_above(one.scale))
        renewed = bits is not None or weight_bits is not None or weights is not None
        for name, (holder, weight) in weight_quantizers(model).items():
            if renewed:
                _renew(holder, weight, new_weight_quantizer(holder, scheme, name))
            if power_of_two:
                _round_scales(holder)
        if renewed:
            _renew_others(model, scheme)
        if correct_weights:
            for layer in layers_of(model):
                _keep_sums(layer)
        state.scheme = scheme
        update_hf_config(model)
    return model


def _scheme_of(
    scheme: Scheme,
    bits: int | None,
    weight_bits: int | None,
    weights: str | int | None,
    symmetric: bool | None,
) -> Scheme:
    changed: dict[str, Any] = {}
    if bits is not None or weight_bits is not None:
        only_float = {p: override for p, override in scheme.overrides.items() if not override}
        changed = {"overrides": only_float, "weight_bits": weight_bits}
        changed["bits"] = scheme.bits if bits is None else bits
    if weights is not None:
        changed["weights"] = weights
    if symmetric is not None:
        changed["symmetric"] = symmetric
    return replace(scheme, **changed)


def _check(
    model: nn.Module,
    scheme: Scheme,
    bits: int | None,
    symmetric: bool | None,
    power_of_two: bool,
) -> None:
    known = weight_quantizers(model)
    for name, one in quantizers(model).items():
        if isinstance(one, OtherGrid):
            raise ValueError(
                f"{one.made_by} chose the grid of {name} for {one.bits} bits: quantize the float "
                "model again"
            )
        if one.observer in SEARCHES and bits not in (None, one.bits):
            raise ValueError(
                f"{one.observer} searched its ranges for {one.bits} bits: quantize "
                f"the float model again for {bits}"
            )
        if symmetric is False and one.symmetric:
            raise ValueError(
                f"{name} has no zero point, and its range does not tell both ends: quantize the "
                "float model with symmetric=False"
            )
        if one.dynamic and power_of_two:
            raise ValueError(
                f"{name} takes its range from each tensor, so that its scale is no power of two: "
                'quantize the float model with a calibrator other than "dynamic"'
            )
    for name, one in model.named_modules():
        if getattr(one, "learned_by", None) is not None:
            raise ValueError(
                f"the scale of {name} is being learned: call freeze_scales(model) first"
            )
        if power_of_two and isinstance(one, WeightQuantizer) and name not in known:
            raise ValueError(
                f"{name} rounds a parameter that no Linear holds, whose scale follows it: leave it "
                "in float, by overrides"
            )
    for name, (holder, weight) in known.items():
        if weight.outliers is not None:
            raise ValueError(
                f"{name} keeps weights in float among its codes: quantize the float model again"
            )
        new_weight_quantizer(holder, scheme, name)  # of groups it says what fits


# ------------------------------------------------------------------ activations


def _regrid(
    model: nn.Module,
    site: str,
    one: ActivationQuantizer,
    bits: int | None,
    symmetric: bool | None,
) -> None:
    if symmetric and isinstance(one, AffineQuantizer):
        made = ActivationQuantizer(one.bits, one.kind, None, one.scale.device)
        for name in ("observer", "calibrated", "enabled", "range_gradient"):
            setattr(made, name, getattr(one, name))
        made.dynamic, made.absmax = False, torch.maximum(-one.low, one.high)
        made.set_bits(one.bits)
        put(model, site, made)
        one = made
    if bits is not None:
        one.set_bits(bits)


def _pairs(model: nn.Module, example: Any) -> list[Pair]:
    """Return the norms that Linear modules read, and nothing else, with constant grids."""
    with in_float(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is left alone
        found = pairs_in(model, Data([example]))
    corrected = {id(model.get_submodule(name)) for name in corrections(model)}
    return [
        pair
        for pair in found
        if pair.alone
        and not hasattr(pair.norm.module, NAME)
        and not any(id(m) in corrected or hasattr(m, NAME) for m in pair.readers.values())
        and all(_is_constant(getattr(m, "input_quantizer", None)) for m in pair.readers.values())
    ]


def _is_constant(one: Any) -> bool:
    return isinstance(one, ActivationQuantizer) and one.calibrated


def _fold(pair: Pair) -> None:
    """Bring the scale of what a norm returns to the nearest power of two, and its readers back."""
    norm: Any = pair.norm.module
    readers: list[Any] = list(pair.readers.values())
    scale = readers[0].input_quantizer.scale
    factor = scale / nearest_power_of_two(scale)
    pair.fold(factor.expand(len(norm.weight)), torch.zeros_like(norm.weight))
    sites = [getattr(norm, "output_quantizer", None), *(m.input_quantizer for m in readers)]
    for one in {id(site): site for site in sites if _is_constant(site)}.values():
        for name in ("scale", *one.range_names):
            setattr(one, name, getattr(one, name) / factor)
    for module in readers:
        weight = module.weight_quantizer
        if isinstance(weight, WeightQuantizer) and weight.scale is not None:
            weight.scale = weight.scale * factor


# ------------------------------------------------------------------ weights


def _renew(holder: Any, one: WeightQuantizer, made: nn.Module) -> None:
    """Give a weight another quantizer; codes of a constant grid stay where they fit."""
    if isinstance(made, WeightQuantizer) and one.scale is not None:
        size = [getattr(x, "size", None) for x in (one, made)]
        if one.axis == made.axis and size[0] == size[1] and made.bits >= one.bits:
            made.scale = one.scale
    holder.weight_quantizer = made


def _renew_others(model: nn.Module, scheme: Scheme) -> None:
    """Give weights that no module holds, whose grids follow them, other ones."""
    known = weight_quantizers(model)
    for name, one in model.named_modules():
        if isinstance(one, WeightQuantizer) and name not in known:
            made = scheme.weight_quantizer(name, 0)
            if isinstance(made, WeightQuantizer):
                one.bits, one.axis = made.bits, made.axis


@torch.no_grad()
def _round_scales(holder: Any) -> None:
    """Make the scales of a weight powers of two: those that clip nothing, or half of them."""
    one, weight = holder.weight_quantizer, holder.weight.detach()
    wide = power_of_two_above(one.scale_of(weight))
    rows = _rows_with_scales(one, weight).double()
    axis = None if one.axis is None else 0
    losses = [
        (fake_quant(rows, scale, one.bits, axis) - rows).square().sum(1)
        for scale in (wide, wide / 2)
    ]
    one.scale = torch.where((losses[1] < losses[0]).view(wide.shape), wide / 2, wide)


def _rows_with_scales(one: WeightQuantizer, weight: Tensor) -> Tensor:
    """Return a weight as (scales, elements)."""
    if one.axis is None:
        return weight.reshape(1, -1)
    rows = one.rows(weight) if isinstance(one, RowQuantizer) else weight
    return rows.movedim(one.axis, 0).flatten(1)


def _keep_sums(layer: Layer) -> None:
    """Round a weight so that the sums of its rows, or groups, change the least.

    They change by less than half a step, and no value by more than one. Its grid is constant then.
    """
    rows = layer.rows
    grid = layer.grid(rows)
    steps = rows / grid.step
    codes = grid.clamp(steps.round())
    size = layer.group_size if isinstance(layer.quantizer, GroupQuantizer) else rows.shape[1]
    lowest, highest = integer_range(grid.bits)
    off, held = (x.unflatten(1, (-1, size)) for x in (codes - steps, codes))
    wanted = off.sum(-1, keepdim=True).round()  # steps too many
    for sign in (1, -1):
        may = (sign * off > 0) & (held * sign > (lowest if sign > 0 else -highest))
        order = torch.where(may, sign * off, -torch.inf).argsort(
            dim=-1, descending=True, stable=True
        )
        rank = torch.empty_like(order).scatter_(
            -1, order, torch.arange(size, device=order.device).expand_as(order)
        )
        held = held - sign * (may & (rank < sign * wanted)).to(held)
    layer.write(held.flatten(1) * grid.step, grid)
