"""FQ-ViT: factors of channels that are powers of two, and logarithms of probabilities."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...fake_quantizer import fake_quant
from ..channel_grids import SHIFTS, ChannelShiftQuantizer
from ..other_grid import put
from ..quantizer import ActivationQuantizer
from ..running import Data, forward_batches, rounding_only
from ..scheme import Scheme
from ..state import quantizers
from ..token_mask import without_padding
from ..value_grids import LogQuantizer
from .method import Regridding


@dataclass(frozen=True)
class FQViT(Regridding):
    """Let each channel of the residual stream have a step of its own, 2^0 to 2^3 times the finest.

    The finest is an eighth of the tensor's step, and a channel takes the one that loses the least
    on `data` (squared error), so that no channel is worse than before. It is for what LayerNorms
    are given: sums and embeddings whose last dimension is that of a LayerNorm. Such grids are
    simulated, saved and loaded, and refused at export. LayerNorm itself computes in float.

    Args:
        log_softmax: round what softmax returns to powers of two, which takes no products. Its
            width is that of the site: overrides={"*_probability_quantizer": {"bits": 4}} is the
            paper's 4 bits.

    Raises:
        ValueError: there are no such sums or, with log_softmax, no probabilities that are rounded;
            or activations have zero points, or no constant ranges.

    Source: Lin et al., FQ-ViT, arXiv 2111.13824, with symmetric grids, over all batches.
    """

    name: ClassVar[str] = "fq_vit"
    log_softmax: bool = False

    def apply(self, model: nn.Module, scheme: Scheme, data: Data) -> None:
        self.check_constant_symmetric(scheme)
        widths = {m.normalized_shape[-1] for m in model.modules() if isinstance(m, nn.LayerNorm)}
        sites = {name: q for name, q in quantizers(model).items() if q.calibrated}
        sums = {name: q for name, q in sites.items() if q.kind == "residual"}
        found = _errors(model, sums, widths, data)
        if not found:
            raise ValueError(
                "fq_vit is for what goes into LayerNorms, none of which is rounded: take a "
                "coverage such as full_no_softmax, with residual=True"
            )
        for site, errors in found.items():
            made = ChannelShiftQuantizer.after(sums[site], errors.shape[1])
            made.scale = made.scale / 2**SHIFTS
            # from the widest on, so that of equal steps the widest wins
            made.exponents = SHIFTS - errors.flip(0).argmin(0).to(made.exponents)
            put(model, site, made)
        if self.log_softmax:
            _take_logarithms(model, sites)


def _take_logarithms(model: nn.Module, sites: dict[str, ActivationQuantizer]) -> None:
    probabilities = {name: q for name, q in sites.items() if q.kind == "probability"}
    if not probabilities:
        raise ValueError(
            "log_softmax is for what softmax returns, which is not rounded here: take coverage "
            "full or linear"
        )
    for site, quantizer in probabilities.items():
        put(model, site, LogQuantizer.after(quantizer))


def _errors(
    model: nn.Module, sites: dict[str, ActivationQuantizer], widths: set[int], data: Data
) -> dict[str, Tensor]:
    """Return what each channel of a site loses by each exponent, float64 (exponents, channels)."""
    sums: dict[str, Tensor] = {}
    others: set[str] = set()  # whose last dimension is no channels

    def see(site: str, quantizer: ActivationQuantizer) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0].detach()
            if x.shape[-1] not in widths or (site in sums and len(sums[site][0]) != x.shape[-1]):
                others.add(site)
                return
            rows = without_padding(x, "residual").reshape(-1, x.shape[-1])
            sums[site] = sums.get(site, 0) + _lost(rows, quantizer)

        return hook

    with ExitStack() as undo, rounding_only(model):
        for site, quantizer in sites.items():
            undo.callback(quantizer.register_forward_pre_hook(see(site, quantizer)).remove)
        forward_batches(model, data.track(FQViT.name), data.mask)
    return {site: found for site, found in sums.items() if site not in others}


def _lost(rows: Tensor, quantizer: ActivationQuantizer) -> Tensor:
    steps = [quantizer.scale * 2.0 ** (k - SHIFTS) for k in range(SHIFTS + 1)]
    errors = (rows - fake_quant(rows, step, quantizer.bits) for step in steps)
    return torch.stack([error.square().sum(0, dtype=torch.float64) for error in errors])
