"""The blocks of a Transformer: where sites belong, and how wide the range of each block is."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..quantization.calibrators import MinMax, Percentile
from ..quantization.running import forward_batches
from ..quantization.token_mask import without_padding
from ..tuning.sites import LAYER_NORM, LINEAR, RMS_NORM, kind_of

NORMS = (LAYER_NORM, RMS_NORM)
OUTSIDE = "outside"  # embeddings, the last norm, the head


def find_blocks(model: nn.Module) -> list[str]:
    """Return the names of the repeated blocks that hold a norm and several Linear modules.

    Of blocks within blocks, such as those of Swin's stages, the innermost.
    """
    blocks = [
        f"{name}.{child_name}".lstrip(".")
        for name, container in model.named_modules()
        if isinstance(container, (nn.ModuleList, nn.Sequential))
        for child_name, child in container.named_children()
        if _is_block(child)
    ]
    return [block for block in blocks if not any(b.startswith(f"{block}.") for b in blocks)]


def block_of(site: str, blocks: Sequence[str]) -> str:
    """Return the block that a site or module is in."""
    return next((block for block in blocks if f"{site}.".startswith(f"{block}.")), OUTSIDE)


def norms_of(block: nn.Module) -> list[nn.Module]:
    """Return the LayerNorm and RMSNorm modules of a block, in the order of its definition."""
    return [module for module in block.modules() if kind_of(module) in NORMS]


@dataclass(frozen=True)
class Range:
    """The values of a tensor; `quantile` is that of the magnitudes, a mean over the batches."""

    low: float
    high: float
    quantile: float

    @property
    def absmax(self) -> float:
        return max(-self.low, self.high)


def block_ranges(model: nn.Module, data: Iterable[Any], percent: float) -> dict[str, Range]:
    """Return the range of what enters each block's second norm (Figs. 4 and 6 of the paper).

    percent: of the magnitudes, for `Range.quantile`. A block with one norm has that one.
    """
    modules = dict(model.named_modules())
    inputs = {name: _Extent(percent) for name in find_blocks(model)}
    handles = []
    for name, extent in inputs.items():
        norm = norms_of(modules[name])[:2][-1]
        handles.append(norm.register_forward_pre_hook(extent.see))
    try:
        forward_batches(model, data)
    finally:
        for handle in handles:
            handle.remove()
    return {name: extent.range() for name, extent in inputs.items()}


class _Extent:
    def __init__(self, percent: float) -> None:
        self._minmax, self._quantile = MinMax(), Percentile(percent)

    def see(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = without_padding(args[0], "residual")
        self._minmax.update(x)
        self._quantile.update(x)

    def range(self) -> Range:
        low, high = self._minmax.range()
        return Range(low.item(), high.item(), self._quantile.absmax().item())


def _is_block(module: nn.Module) -> bool:
    kinds = [kind_of(child) for child in module.modules()]
    return kinds.count(LINEAR) > 1 and any(kind in NORMS for kind in kinds)
