"""What a quantized model rounds, and with which grids."""

from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from ..fake_quantizer import integer_range
from .insertion import quantizers, state_of, weight_quantizers
from .quantizer import ActivationQuantizer


@dataclass(frozen=True)
class Site:
    """One quantizer. A weight with a scale per channel has the largest of them here."""

    name: str
    kind: str  # "weight", or a kind of quanttune.quantization.coverage
    bits: int
    granularity: str  # "tensor" or "channel"
    scale: float | None  # None: taken from each tensor, or never reached during calibration
    absmax: float | None  # what the grid covers
    zero_point: int | None = None  # of an affine grid: the code of 0


@dataclass(frozen=True)
class Summary:
    """The quantizers of a model; prints as a table, and as a line per site."""

    model: str
    coverage: str
    sites: tuple[Site, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        header = ("site", "kind", "bits", "granularity", "scale", "absmax", "zero_point")
        rows = [header, *(_cells(site) for site in self.sites)]
        if all(site.zero_point is None for site in self.sites):
            rows = [row[:-1] for row in rows]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(
                cell.ljust(width) if i in (0, 1, 3) else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        return "\n".join([f"{self.model}, coverage {self.coverage}", *lines])


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
        name: Site(name, quantizer.kind, quantizer.bits, "tensor", *_range(quantizer))
        for name, quantizer in quantizers(model).items()
    }
    for name, (module, quantizer) in weight_quantizers(model).items():
        scale = quantizer.scale_of(module.weight).max().item()
        absmax = scale * integer_range(quantizer.bits)[1]
        granularity = "tensor" if quantizer.axis is None else "channel"
        rows[name] = Site(name, "weight", quantizer.bits, granularity, scale, absmax)
    order = [name for name, _ in model.named_modules() if name in rows]
    scheme = state.scheme
    coverage = scheme.coverage + ("" if scheme.residual else " without residual")
    return Summary(type(model).__name__, coverage, tuple(rows[name] for name in order))


def _range(quantizer: ActivationQuantizer) -> tuple[float | None, float | None, int | None]:
    if quantizer.dynamic or not quantizer.reached:
        return None, None, None
    scale = quantizer.step.item()
    qmin, qmax = integer_range(quantizer.bits)
    if quantizer.symmetric:
        return scale, scale * qmax, None
    zero = quantizer.zero
    return scale, scale * max(zero - qmin, qmax - zero), zero


def _cells(site: Site) -> tuple[str, ...]:
    numbers = ("-" if x is None else f"{x:.4g}" for x in (site.scale, site.absmax))
    zero_point = "-" if site.zero_point is None else str(site.zero_point)
    return (site.name, site.kind, str(site.bits), site.granularity, *numbers, zero_point)
