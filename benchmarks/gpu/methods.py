"""That the methods of quantization do on the device what they do on the CPU."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

import quanttune as qt
from benchmarks.gpu.machine import Machine
from quanttune.quantization.methods import ERQ, GPTQ, METHODS
from quanttune.quantization.state import weight_quantizers

WAYS: list[Any] = [*METHODS, GPTQ(hessian="fisher"), GPTQ(act_order=True), ERQ(flip="greedy")]
LEAST = 0.98  # of the codes are equal: sums in another order move those that are near a half


@torch.no_grad()
def methods(machine: Machine) -> dict[str, Any]:
    """Quantize a small ViT by each method on both; an AssertionError ends the suite."""
    import timm

    torch.manual_seed(0)
    sizes = {"img_size": 32, "embed_dim": 96, "depth": 1 if machine.dry else 4, "num_heads": 3}
    model = timm.create_model("vit_tiny_patch16_224", patch_size=8, **sizes).eval()
    data = torch.randn(16, 3, 32, 32).split(8)
    worst = 1.0
    for way in WAYS:
        found, expected = (_quantized(model, data, [way], d) for d in (machine.device, "cpu"))
        for name, weight in expected.items():
            step = weight.abs().amax(1, keepdim=True) / 7
            equal = ((found[name] - weight).abs() < step / 2).double().mean().item()
            assert equal >= LEAST, f"{way}: only {equal:.1%} of the codes of {name} are equal"
            worst = min(worst, equal)
    return {"least_equal": worst}


def _quantized(
    model: nn.Module, data: tuple[Tensor, ...], way: list[Any], device: str
) -> dict[str, Tensor]:
    """Return the rounded weights, row by row, of a model that was quantized on a device."""
    there = [x.to(device) for x in data]
    # fq_vit is for sums, which the other coverage leaves in float
    coverage = "full_no_softmax" if way == ["fq_vit"] else "linear"
    options = {"weight_bits": 4, "coverage": coverage, "methods": way, "data": there}
    quantized = qt.quantize(copy.deepcopy(model).to(device), 8, **options)
    assert quantized(there[0]).isfinite().all()
    return {
        name: quantizer(module.weight).cpu().flatten(1)
        for name, (module, quantizer) in weight_quantizers(quantized).items()
    }
