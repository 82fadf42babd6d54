"""Reach into a quantized model: watch the float tensors at its sites, or round only some of them.

A site is named like its quantizer: `blocks.0.attn.qkv.input` belongs to `input_quantizer`.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..quantization.quantizer import ActivationQuantizer
from ..quantization.running import enable_weights, forward_batches, main_output
from ..quantization.state import quantizers
from ..quantization.token_mask import counting, inside, without_padding

See = Callable[[str, Tensor, Tensor | None], None]  # a site, its tensor, what is no padding


def sites_of(quantized: nn.Module) -> dict[str, ActivationQuantizer]:
    """Return the quantizers that were calibrated, by site, in the order of the model's modules."""
    return {
        name.removesuffix("_quantizer"): quantizer
        for name, quantizer in quantizers(quantized).items()
        if quantizer.reached
    }


@contextmanager
def rounding_only(
    quantized: nn.Module, sites: Collection[str], weights: bool = False, see: See | None = None
) -> Iterator[None]:
    """Let all pass unrounded but what enters `sites`, and the weights if they are to be rounded.

    `see` is called with the name and the tensor of every other site, and which of its elements are
    no padding (`quantization.padding.inside`).
    """
    passing: list[nn.Module] = []
    for site, quantizer in sites_of(quantized).items():
        if site not in sites:
            quantizer.forward = partial(_pass, see, site, quantizer.kind)  # type: ignore[method-assign]
            passing.append(quantizer)
    if not weights:
        enable_weights(quantized, False)
    try:
        yield
    finally:
        enable_weights(quantized, True)
        for module in passing:
            del module.forward


def watch(quantized: nn.Module, data: Iterable[Any], see: See) -> None:
    """Run a quantized model in float, and show the tensor at each site to `see`."""
    with rounding_only(quantized, (), see=see):
        forward_batches(quantized, data)


@torch.no_grad()
def outputs_of(model: nn.Module, data: Iterable[Any]) -> list[Tensor]:
    """Return the model's output for each batch, its logits or last hidden state, and no padding."""
    outputs = []
    for batch in data:
        with counting(model, batch) as (args, kwargs):
            outputs.append(without_padding(main_output(model(*args, **kwargs)), "output"))
    return outputs


def _pass(see: See | None, site: str, kind: str, x: Tensor) -> Tensor:
    if see:
        see(site, x, inside(x, kind))
    return x
