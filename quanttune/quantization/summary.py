"""What a quantized model rounds, and with which grids."""

import math
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..fake_quantizer import integer_range
from .float_parameters import float_parameters, is_asked_for, rounded_parameters
from .functional.modes import class_of
from .other_grid import OtherGrid
from .powers_of_two import is_power_of_two
from .product_counts import UNSEEN
from .quantizer import ActivationQuantizer
from .state import quantizers, state_of, weight_quantizers

LITTLE = 0.01  # of a model: what is less is not listed


@dataclass(frozen=True)
class Site:
    """One quantizer. A weight with several scales has the largest of them here."""

    name: str
    kind: str  # "weight", or a kind of quanttune.quantization.coverage
    bits: int
    granularity: str  # "tensor", "channel" or "group"
    scale: float | None  # None: taken from each tensor, or never reached during calibration
    absmax: float | None  # what the grid covers
    zero_point: int | None = None  # of an affine grid: the code of 0
    grid: str = "uniform"  # or one of other_grids.py: its largest step, and what it covers


@dataclass(frozen=True)
class Float:
    """What stays in float: a parameter, or the products at one place of the model."""

    name: str
    kind: str  # "parameter" or "product"
    share: float  # of all parameters, or of all multiplications
    reason: str
    is_asked_for: bool  # by the coverage or an override

    def __str__(self) -> str:
        return f"{self.name}, {self.share:.1%} of the {self.kind}s: {self.reason}"


@dataclass(frozen=True)
class Summary:
    """The quantizers of a model; prints as a table, and as a line per site."""

    model: str
    coverage: str
    sites: tuple[Site, ...]
    integer_parameters: float = 1.0  # share of the parameters, by number
    # share of the multiplications in products of the first batch of calibration; None if there was
    # none, as in a model that was loaded
    integer_products: float | None = None
    floats: tuple[Float, ...] = ()  # what is above 1 % of either, largest first
    power_of_two: bool = False  # all scales of constant grids, of which there are some

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        header = ("site", "kind", "bits", "granularity", "scale", "absmax", "grid", "zero_point")
        rows = [header, *(_cells(site) for site in self.sites)]
        plain = "-", "uniform"  # columns that say nothing of any site are left out
        kept = [
            i for i, cells in enumerate(zip(*rows[1:], strict=True)) if i < 6 or {*cells} - {*plain}
        ]
        rows = [tuple(row[i] for i in kept) for row in rows]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(
                cell.ljust(width) if i in (0, 1, 3) else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        shares = f"{self.integer_parameters:.1%} of the parameters are integers"
        if self.integer_products is not None:
            shares += f", and {self.integer_products:.1%} of what is multiplied"
        shares += "\nall scales are powers of two" if self.power_of_two else ""
        floats = [f"  {one}" for one in self.floats]
        head = f"{self.model}, coverage {self.coverage}"
        return "\n".join([head, *lines, shares, *(["in float:"] if floats else []), *floats])


def summary(model: nn.Module) -> Summary:
    """List what a quantized model rounds: sites, kinds, bits, granularity, scale and range.

    Grids with zero points have them too: they go from `qmin - zero_point` steps to `qmax -
    zero_point`, and `absmax` is the farther end.

    Print it for a table; `sites` and `as_dict()` hold the numbers.

    Raises:
        ValueError: the model is not quantized.
    """
    state = state_of(model)
    rows = {
        name: Site(
            name, quantizer.kind, quantizer.bits, "tensor", *_range(quantizer), quantizer.grid
        )
        for name, quantizer in quantizers(model).items()
    }
    for name, (module, quantizer) in weight_quantizers(model).items():
        scale = quantizer.scale_of(module.weight).max().item()
        absmax = scale * integer_range(quantizer.bits)[1]
        rows[name] = Site(name, "weight", quantizer.bits, quantizer.granularity, scale, absmax)
    order = [name for name, _ in model.named_modules() if name in rows]
    scheme = state.scheme
    coverage = scheme.coverage + ("" if scheme.residual else " without residual")
    sites = tuple(rows[name] for name in order)
    shifts = all(is_power_of_two(scale) for scale in _scales(model)) and bool(sites)
    return Summary(class_of(model).__name__, coverage, sites, *_shares(model), shifts)


def _scales(model: nn.Module) -> Iterator[Tensor]:
    """Yield the scales of a model; NaN where they are not constant."""
    for one in quantizers(model).values():
        yield (
            one.step
            if one.calibrated and not isinstance(one, OtherGrid)
            else torch.tensor(math.nan)
        )
    for module, weight in weight_quantizers(model).values():
        yield weight.scale_of(module.weight)


def warn_of_floats(model: nn.Module) -> None:
    """Name the products that stay in float though nobody asked for it."""
    parameters, products, floats = _shares(model)
    unasked = [one for one in floats if one.kind == "product" and not one.is_asked_for]
    if unasked:
        warnings.warn(
            f"{parameters:.0%} of the parameters and {products:.0%} of what is multiplied are "
            f"integers. In float stay: {'; '.join(map(str, unasked[:5]))}",
            stacklevel=3,
        )


def _shares(model: nn.Module) -> tuple[float, float | None, tuple[Float, ...]]:
    total, parameters = rounded_parameters(model), float_parameters(model)
    sizes = dict(model.named_parameters())
    count = sum(p.numel() for p in sizes.values() if p.is_floating_point()) or 1
    found = [
        Float(name, "parameter", sizes[name].numel() / count, reason, is_asked_for(reason))
        for name, reason in parameters.items()
    ]
    products = state_of(model).products
    found += [
        Float(p.name, "product", p.share, p.reason, p.reason != UNSEEN)
        for p in products
        if p.reason and p.share > LITTLE
    ]
    integers = sum(p.share for p in products if not p.reason) if products else None
    return total / count, integers, tuple(sorted(found, key=lambda one: -one.share))


def _range(quantizer: ActivationQuantizer) -> tuple[float | None, float | None, int | None]:
    if quantizer.dynamic or not quantizer.calibrated:
        return None, None, None
    if isinstance(quantizer, OtherGrid):
        return quantizer.largest_step.item(), quantizer.absmax.item(), None
    scale = quantizer.step.item()
    qmin, qmax = integer_range(quantizer.bits)
    if quantizer.symmetric:
        return scale, scale * qmax, None
    zero = quantizer.code_of_zero()
    return scale, scale * max(zero - qmin, qmax - zero), zero


def _cells(site: Site) -> tuple[str, ...]:
    numbers = ("-" if x is None else f"{x:.4g}" for x in (site.scale, site.absmax))
    zero_point = "-" if site.zero_point is None else str(site.zero_point)
    return (site.name, site.kind, str(site.bits), site.granularity, *numbers, site.grid, zero_point)
