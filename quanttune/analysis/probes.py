"""Reach into a quantized model: watch the float tensors at its sites, or round only some of them.

A site is named like its quantizer: `blocks.0.attn.qkv.input` belongs to `input_quantizer`.
"""

from collections.abc import Callable, Collection, Iterable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ..quantization.quantizer import ActivationQuantizer
from ..quantization.running import forward_batches, main_output, rounding_only
from ..quantization.state import quantizers
from ..quantization.token_mask import counting, inside, without_padding

See = Callable[[str, Tensor, Tensor | None], None]  # a site, its tensor, what is no padding


def sites_of(quantized: nn.Module) -> dict[str, ActivationQuantizer]:
    """Return the quantizers that were calibrated, by site, in the order of the model's modules."""
    return {
        name.removesuffix("_quantizer"): quantizer
        for name, quantizer in quantizers(quantized).items()
        if quantizer.calibrated
    }


def rounding_sites(
    quantized: nn.Module, sites: Collection[str], weights: bool = False
) -> AbstractContextManager[None]:
    """Let all pass unrounded but what enters `sites`, and the weights if they are to be rounded."""
    return rounding_only(quantized, {f"{site}_quantizer" for site in sites}, weights)


def watch(quantized: nn.Module, data: Iterable[Any], see: See) -> None:
    """Run a quantized model in float, and show the tensor at each site to `see`.

    With the name of the site, and which of the elements are no padding (`token_mask.inside`).
    """
    with rounding_only(quantized), ExitStack() as undo:
        for site, quantizer in sites_of(quantized).items():

            def show(quantizer: Any, args: tuple[Tensor], site: str = site) -> None:
                see(site, args[0], inside(args[0], quantizer.kind))

            undo.callback(quantizer.register_forward_pre_hook(show).remove)
        forward_batches(quantized, data)


@torch.no_grad()
def outputs_of(model: nn.Module, data: Iterable[Any]) -> list[Tensor]:
    """Return the model's output for each batch, its logits or last hidden state, and no padding."""
    outputs = []
    for batch in data:
        with counting(model, batch) as (args, kwargs):
            outputs.append(without_padding(main_output(model(*args, **kwargs)), "output"))
    return outputs
