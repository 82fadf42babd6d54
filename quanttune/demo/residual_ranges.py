"""The dynamic range of a model's residual stream, layer by layer (Fig. 6 of the paper)."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from ..quantization.running import forward_batches
from ..tuning.sites import LAYER_NORM, RMS_NORM, kind_of


def residual_ranges(model: nn.Module, data: Iterable[Any]) -> dict[str, float]:
    """Return max|x| of the input of every norm over `data`, in the order of the forward."""
    ranges: dict[str, float] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            ranges[name] = max(ranges.get(name, 0.0), args[0].abs().max().item())

        return hook

    norms = [(n, m) for n, m in model.named_modules() if kind_of(m) in (LAYER_NORM, RMS_NORM)]
    handles = [module.register_forward_pre_hook(watch(name)) for name, module in norms]
    try:
        forward_batches(model, data)
    finally:
        for handle in handles:
            handle.remove()
    return ranges
