"""PEG: activations in groups of channels, each with a scale."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...fake_quantizer import scale_of
from ..channel_grids import ChannelGroupQuantizer
from ..modules import QuantizedConvolution
from ..other_grid import put
from ..quantizer import ActivationQuantizer
from ..running import Data, forward_batches, rounding_only
from ..scheme import Scheme
from ..state import quantizers
from ..token_mask import without_padding
from .equalizing.norms import may_normalize
from .method import Regridding

KINDS = ("residual", "norm", "input", "output")  # whose last dimension has channels


@dataclass(frozen=True)
class PEG(Regridding):
    """Give groups of channels scales of their own, so that large ones cost the others nothing.

    Channels are sorted by their range on `data` before they are cut into groups of one size, so
    that those of a large range are together. A group covers its largest value, and no more than the
    calibrator left of the whole tensor.

    Such grids are simulated, saved and loaded, and refused at export.

    Args:
        groups: how many, of each tensor; 6 in the paper. One of fewer channels has that many.
        permute: sort channels by range; otherwise neighbours are a group.
        kinds: of activations (quanttune.quantization.coverage) that get them.

    Raises:
        ValueError: an option is out of range, no such tensor is rounded, or activations have zero
            points or no constant ranges.

    Source: Bondarenko et al., Understanding and Overcoming the Challenges of Efficient Transformer
    Quantization, arXiv 2109.12948, with symmetric grids.
    """

    name: ClassVar[str] = "peg"
    groups: int = 6
    permute: bool = True
    kinds: tuple[str, ...] = KINDS

    def __post_init__(self) -> None:
        if type(self.groups) is not int or self.groups < 1:
            raise ValueError(f"groups must be a whole number from 1, got {self.groups!r}")
        if unknown := [kind for kind in self.kinds if kind not in KINDS]:
            raise ValueError(f"kinds must be of {', '.join(KINDS)}, got {unknown[0]!r}")

    def apply(self, model: nn.Module, scheme: Scheme, data: Data) -> None:
        self.check_constant_symmetric(scheme)
        sites = {
            name: one
            for name, one in quantizers(model).items()
            if one.calibrated and one.kind in self.kinds and not _is_of_convolution(model, name)
        }
        found = _ranges(model, sites, data)
        if not found:
            raise ValueError(
                f"peg is for activations of {', '.join(self.kinds)}, none of which is rounded: "
                "take another coverage"
            )
        for site, ranges in found.items():
            one = sites[site]
            made = ChannelGroupQuantizer.after(one, len(ranges))
            covered = torch.minimum(self.covered(ranges), one.absmax)
            made.steps = scale_of(covered, one.bits)
            put(model, site, made)

    def covered(self, ranges: Tensor) -> Tensor:
        """Return the largest range in the group of each channel, of the shape (channels,)."""
        order = torch.arange(len(ranges), device=ranges.device)
        order = ranges.argsort(stable=True) if self.permute else order
        covered = torch.empty_like(ranges)
        for group in order.tensor_split(min(self.groups, len(ranges))):
            covered[group] = ranges[group].max()
        return covered


def _is_of_convolution(model: nn.Module, site: str) -> bool:
    return isinstance(model.get_submodule(site.rpartition(".")[0]), QuantizedConvolution)


def _ranges(
    model: nn.Module, sites: dict[str, ActivationQuantizer], data: Data
) -> dict[str, Tensor]:
    """Return the largest magnitude of each channel of a site, float32 (channels,)."""
    seen: dict[str, Tensor] = {}
    others: set[str] = set()  # whose last dimension is no channels
    norms: list[Any] = [m for m in model.modules() if may_normalize(m)]
    widths = {norm.weight.numel() for norm in norms if norm.weight is not None}

    def see(site: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0].detach()
            width = x.shape[-1] if x.dim() else 0
            is_sum = sites[site].kind == "residual"
            if (is_sum and width not in widths) or len(seen.get(site, range(width))) != width:
                others.add(site)
                return
            rows = without_padding(x, "residual").reshape(-1, x.shape[-1]).float()
            if len(rows):
                largest = rows.abs().amax(0)
                seen[site] = torch.maximum(seen[site], largest) if site in seen else largest

        return hook

    with ExitStack() as undo, rounding_only(model):
        for site, quantizer in sites.items():
            undo.callback(quantizer.register_forward_pre_hook(see(site)).remove)
        forward_batches(model, data.track(PEG.name), data.mask)
    return {site: found for site, found in seen.items() if site not in others}
