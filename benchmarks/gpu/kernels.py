"""What the Triton kernels cost at the sizes of real sites, beside ceilings and rivals."""

from typing import Any

import torch
from torch import Tensor

from benchmarks import eager
from benchmarks.gpu.machine import DTYPES, Machine
from quanttune import fused_observer, triton_kernels

# samples x elements: ViT-B (64 x 197 tokens), OPT-1.3B and OPT-6.7B (8 x 1,024 and 2,048 tokens)
SITES = {
    "ViT-B hidden": (64, 197 * 768),
    "OPT-1.3B hidden": (8, 1024 * 2048),
    "ViT-B feed-forward": (64, 197 * 3072),
    "OPT-6.7B hidden": (8, 2048 * 4096),
    "OPT-6.7B, two of them": (8, 2048 * 8192),
    "OPT-6.7B feed-forward": (8, 2048 * 16384),
}
DRY_SITES = {"tiny": (2, 4000)}
EAGER_MEGABYTES = 150  # plain PyTorch would take seconds beyond
SCALE, QMIN, QMAX = 0.03, -128, 127


def ceilings(machine: Machine) -> dict[str, Any]:
    """Measure what the machine can do: read, copy, multiply."""
    x = eager.normal((1 << 12 if machine.dry else 1 << 29,), torch.bfloat16, machine.device)
    target = torch.empty_like(x)
    side = 64 if machine.dry else 8192
    a, b = (eager.normal((side, side), torch.bfloat16, machine.device) for _ in range(2))
    moved = x.numel() * x.element_size() / 1e6
    return {
        "megabytes": moved,
        "read_gb_per_s": moved / machine.milliseconds(lambda: x.view(torch.int16).amax()),
        "copy_gb_per_s": 2 * moved / machine.milliseconds(lambda: target.copy_(x)),
        "matmul_tflop_per_s": 2 * side**3 / 1e9 / machine.milliseconds(lambda: a @ b),
    }


def kernels(machine: Machine) -> dict[str, Any]:
    """Time every op at every site; plain PyTorch, torch.compile and torch's own beside it."""
    sites = DRY_SITES if machine.dry else SITES
    rows = [_site(machine, name, shape, "bfloat16") for name, shape in sites.items()]
    name = "tiny" if machine.dry else "OPT-6.7B hidden"
    rows += [_site(machine, name, sites[name], dtype) for dtype in ("float16", "float32")]
    return {"rows": rows}


def _site(machine: Machine, name: str, shape: tuple[int, ...], dtype: str) -> dict[str, Any]:
    x = eager.normal(shape, DTYPES[dtype], machine.device)
    grad = torch.ones_like(x)
    scale = torch.tensor([SCALE], device=x.device)
    weights = torch.ones(len(x), device=x.device)
    statistics = triton_kernels.outlier_statistics(x, len(x), False)
    time = machine.milliseconds
    forward = time(lambda: triton_kernels.outlier_statistics(x, len(x), False))
    backward = time(
        lambda: triton_kernels.outlier_statistics_backward(
            grad, x, statistics, weights, False, False
        )
    )
    fake = time(lambda: triton_kernels.fake_quant(x, scale, QMIN, QMAX, None))
    masked = time(lambda: triton_kernels.fake_quant_backward(grad, x, scale, QMIN, QMAX, None))
    dynamic = time(lambda: triton_kernels.dynamic_fake_quant(x, QMIN, QMAX, None))
    torch_fake = time(
        lambda: torch.fake_quantize_per_tensor_affine(x.detach(), SCALE, 0, QMIN, QMAX)
    )
    megabytes = x.numel() * x.element_size() / 1e6
    row = {
        "site": name,
        "shape": list(shape),
        "dtype": dtype,
        "megabytes": megabytes,
        "milliseconds": {
            "forward": forward,
            "backward": backward,
            "fake_quant": fake,
            "fake_quant_backward": masked,
            "dynamic_fake_quant": dynamic,
            "torch fake_quantize": torch_fake,
        },
        "forward_gb_per_s": megabytes / forward,
        # as a copy counts: two tensors are read and one is written
        "backward_gb_per_s": 3 * megabytes / backward,
        "fake_quant_vs_torch": torch_fake / fake,
    }
    if megabytes <= EAGER_MEGABYTES:
        _add_rivals(machine, row, x)
    return row


def _add_rivals(machine: Machine, row: dict[str, Any], x: Tensor) -> None:
    """Add forward and backward through autograd: ours, plain PyTorch, and plain but compiled."""
    calls = {"ours": fused_observer.outlier_ratio, "eager": eager.ratio}
    if not machine.dry:
        calls["compiled"] = torch.compile(eager.ratio, dynamic=False)
    times = {
        f"step, {name}": machine.milliseconds(lambda of=of: eager.gradient(of, x))
        for name, of in calls.items()
    }
    row["milliseconds"] |= times
    row["step_vs_eager"] = times["step, eager"] / times["step, ours"]
    if "compiled" in calls:
        row["step_vs_compiled"] = times["step, compiled"] / times["step, ours"]
