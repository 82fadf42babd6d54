"""The codes that a quantized model makes while it runs, and the same model with a little noise."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...quantization.channel_grids import NoisyQuantizer
from ...quantization.state import quantizers
from ..integer_weights import MAX_INTEGER_BITS
from .agreement import Layer

NOISE = 1e-5  # of what a grid covers; a hundred times what sums of 32-bit floats lose


@contextmanager
def recording(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Yield the codes of each site and call, filled by the next forward, as a file names them.

    They are int8, whatever type the file has. What is rounded to more than 8 bits has none.
    """
    found: dict[str, Tensor] = {}
    calls: dict[str, int] = defaultdict(int)

    def record(site: str, quantizer: Any, output: Tensor) -> None:
        number = f"_{calls[site]}" if calls[site] else ""
        calls[site] += 1
        if isinstance(quantizer, NoisyQuantizer):
            output = output + quantizer.noise
        # exact: what is returned is a code times the scale
        codes = (output / quantizer.step).round() + quantizer.zero
        found[f"{site}.codes{number}"] = codes.to(torch.int8).cpu()

    with ExitStack() as undo:
        for site, quantizer in quantizers(model).items():
            if quantizer.calibrated and quantizer.bits <= MAX_INTEGER_BITS:
                handle = quantizer.register_forward_hook(
                    lambda quantizer, _, output, site=site: record(site, quantizer, output)
                )
                undo.callback(handle.remove)
        yield found


@contextmanager
def perturbed(model: nn.Module, seed: int, layers: Iterable[Layer] = ()) -> Iterator[None]:
    """Change what a model rounds by a little, so that codes flip.

    By `NOISE` of what the grid covers, since the error of a sum is that of its largest terms; and
    so that about twice as many codes flip as in `layers` of a file, those that agree. Noise at the
    model's inputs alone would be gone behind the first rounding.
    """
    generator = torch.Generator().manual_seed(seed)
    shares: dict[str, float] = {}
    for layer in layers:
        if layer.agrees:
            shares[layer.site] = max(layer.differ, shares.get(layer.site, 0.0))

    def change(site: str, quantizer: Any, x: Tensor) -> Tensor:
        # noise of a deviation of d steps flips 0.8 d of the codes
        deviation = NOISE * 2 ** (quantizer.bits - 1) + 2.5 * shares.get(site, 0.0)
        steps = torch.randn(x.shape, generator=generator) * deviation
        return x + steps.to(x) * quantizer.step

    with ExitStack() as undo:
        for site, quantizer in quantizers(model).items():
            handle = quantizer.register_forward_pre_hook(
                lambda quantizer, args, site=site: change(site, quantizer, *args)
            )
            undo.callback(handle.remove)
        yield


def shifted(codes: Tensor, by: int, dtype: str) -> Tensor:
    """Return codes of another type, whose zero is elsewhere: those of uint8 are shifted by 128."""
    return (codes.int() + by).to(getattr(torch, dtype))
