"""What a quantized model rounds, and with which grids."""

from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from ..fake_quantizer import integer_range
from .insertion import quantizers, state_of, weight_quantizers


@dataclass(frozen=True)
class Site:
    """One quantizer. A weight with a scale per channel has the largest of them here."""

    name: str
    kind: str  # "weight", or a kind of quanttune.quantization.coverage
    bits: int
    granularity: str  # "tensor" or "channel"
    scale: float | None  # None: taken from each tensor, or never reached during calibration
    absmax: float | None  # what the grid covers


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
        header = ("site", "kind", "bits", "granularity", "scale", "absmax")
        rows = [header, *(_cells(site) for site in self.sites)]
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


def _range(quantizer: Any) -> tuple[float | None, float | None]:
    if quantizer.dynamic or not quantizer.reached:
        return None, None
    scale = quantizer.step.item()
    return scale, scale * integer_range(quantizer.bits)[1]


def _cells(site: Site) -> tuple[str, ...]:
    numbers = ("-" if x is None else f"{x:.4g}" for x in (site.scale, site.absmax))
    return (site.name, site.kind, str(site.bits), site.granularity, *numbers)
