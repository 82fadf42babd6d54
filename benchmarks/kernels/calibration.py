"""What calibrating costs: all sites of a ViT-B beside its float forward, a search beside a loop.

The model has random weights, which change no time. `full` coverage observes 234 tensors of it:
every operand, score, probability and residual sum. A calibration includes the float forwards in
which it observes, and what `quantize` does around them.
"""

import copy
from collections.abc import Callable
from functools import partial
from time import perf_counter
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quanttune.fake_quantizer import scale_of
from quanttune.quantization.calibrators import RANGES, SEARCHES, SymmetricOMSE
from quanttune.quantization.running import forward_batches
from quanttune.quantization.simulation import quantize

BATCHES, IMAGES = 2, 10
LARGE = 15_000_000  # elements of a site, at 100 images and 768 channels


def check() -> None:
    """Check that the search and the loop find the same range."""
    x = heavy_tailed(LARGE // 100)
    ours, loops = search(x).item(), loop(x).item()
    # one candidate apart where losses are nearly equal: torch's grid rounds another way
    assert abs(ours - loops) <= 0.011 * x.abs().max()


def calibration_times() -> dict[str, dict[str, float]]:
    """Return the milliseconds of the slowest range and the slowest search, beside the forward."""
    torch.manual_seed(0)
    model = timm.create_model("vit_base_patch16_224").eval()
    data = [torch.randn(IMAGES, 3, 224, 224) for _ in range(BATCHES)]
    forward = partial(forward_batches, model, data)
    forward()
    return {
        "calibrate_vs_forward": _slowest(RANGES, model, data, forward),
        "search_vs_forward": _slowest(SEARCHES, model, data, forward),
    }


def _slowest(
    names: Any, model: nn.Module, data: list[Tensor], forward: Callable[[], Any]
) -> dict[str, float]:
    times = {}
    forwards = [_milliseconds(forward)]
    for name in names:
        copied = copy.deepcopy(model)  # quantize changes it
        call = partial(quantize, copied, calibrator=name, coverage="full", data=data)
        times[name] = _milliseconds(call)
        forwards.append(_milliseconds(forward))
    return {"ours": max(times.values()), "forward": sum(forwards) / len(forwards), **times}


def search_times() -> dict[str, float]:
    """Return the milliseconds of OMSE on a tensor, by one read and by a loop over candidates."""
    x = heavy_tailed(LARGE)
    search(x)
    ours = [_milliseconds(partial(search, x)) for _ in range(3)]
    return {"ours": sorted(ours)[1], "loop": _milliseconds(partial(loop, x))}


def heavy_tailed(size: int) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(size) * torch.randn(size).exp()


def search(x: Tensor) -> Tensor:
    """Return the range that OMSE finds on an 8-bit grid."""
    calibrator = SymmetricOMSE(8)
    calibrator.update(x)
    return calibrator.absmax()


def loop(x: Tensor) -> Tensor:
    """Return the same, by PyTorch's own fake quantization with each of the 90 ranges."""
    ranges = x.abs().max() * (1 - 0.01 * torch.arange(90))
    losses = []
    for step in scale_of(ranges, 8).tolist():
        losses.append(F.mse_loss(torch.fake_quantize_per_tensor_affine(x, step, 0, -128, 127), x))
    return ranges[torch.stack(losses).argmin()]


def _milliseconds(call: Callable[[], Any]) -> float:
    start = perf_counter()
    call()
    return 1e3 * (perf_counter() - start)


if __name__ == "__main__":
    check()
    print(search_times(), calibration_times())
