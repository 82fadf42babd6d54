"""That the Triton kernels are right on the device: against float64, repeated, on another stream."""

import shutil
import subprocess
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from benchmarks import eager
from benchmarks.gpu.machine import DTYPES, Machine
from quanttune import reference, triton_kernels
from quanttune.reference import MAXIMUM, MAXIMUM_COUNT, MEDIAN, MEDIAN_COUNT

SHAPES = [(1, 1), (3, 1000)]
TOKENS = [(3, 7, 33)]
GPU_TOKENS = [(2, 5, 256), (64, 197, 768), (8, 2048, 4096), (2, 100, 16384)]
GPU_SHAPES = [(2, 70_001), (5, 8193), (64, 197 * 768), (8, 2048 * 1024), (1, 2**24 + 3)]
KINDS = ("outlier", "rounded")
COUNTED = [MAXIMUM, MEDIAN, MAXIMUM_COUNT, MEDIAN_COUNT]  # the same bits everywhere
# half a unit in the last place, and what the float32 terms of a gradient are off
GATE = {torch.bfloat16: 2**-8 + 2e-5, torch.float16: 2**-11 + 2e-5, torch.float32: 2e-5}
STATISTICS_GATE = 4e-6
SCALE, QMIN, QMAX = 0.03, -128, 127


def correctness(machine: Machine) -> dict[str, Any]:
    """Check every kernel on every dtype and shape; an AssertionError ends the suite."""
    shapes = SHAPES if machine.dry else SHAPES + GPU_SHAPES
    checked = 0
    for dtype in DTYPES.values():
        for shape in shapes:
            for kind in KINDS:
                _check(machine, _rows(machine, kind, shape, dtype))
                checked += 1
        for shape in TOKENS if machine.dry else TOKENS + GPU_TOKENS:
            x = _rows(machine, "outlier", (shape[0], shape[1] * shape[2]), dtype)
            _check_padded(x.view(shape))
            checked += 1
    repeats = 2 if machine.dry else 250
    for dtype in DTYPES.values():
        _check_repeats(machine, dtype, repeats)
    return {"checked": checked, "repeats": repeats}


def sanitizer(machine: Machine) -> dict[str, Any]:
    """Run the small checks under compute-sanitizer, which finds stray accesses and races."""
    tool = shutil.which("compute-sanitizer")
    if machine.dry or tool is None:
        return {"skipped": "dry run" if machine.dry else "compute-sanitizer is not on the PATH"}
    found = {}
    for check in ("memcheck", "racecheck"):
        command = [
            tool,
            "--tool",
            check,
            "--error-exitcode",
            "9",
            sys.executable,
            "-m",
            __spec__.name,
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=150)
        if done.returncode:
            raise AssertionError(f"{check}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
        found[check] = next(line for line in done.stdout.splitlines() if "SUMMARY" in line)
    return found


def graph_capture(machine: Machine) -> dict[str, Any]:
    """Capture forward and backward in a CUDA graph, replay it on other data, and compare."""
    if machine.dry:
        return {"skipped": "dry run"}
    x = eager.normal((8, 300_000), torch.bfloat16, machine.device)
    other = 3 * x.flip(1)
    expected = [result.clone() for result in _both(other)]
    _both(x)  # compiled before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = _both(x)
    x.copy_(other)
    graph.replay()
    machine.synchronize()
    for actual, wanted in zip(results, expected, strict=True):
        assert torch.equal(actual, wanted), "a replayed graph gives other bits"
    return {"captured": True}


def _rows(machine: Machine, kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    x = eager.normal(shape, torch.float32, machine.device)
    if kind == "outlier":
        x[:, shape[1] // 3] = 300.0
    else:
        x = (x * 4).round() / 4  # ties everywhere
    return x.to(dtype)


def _both(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the statistics of x, and the gradient of its weighted ratios on top of zeros."""
    statistics = triton_kernels.outlier_statistics(x, len(x), False)
    gradient = triton_kernels.outlier_statistics_backward(
        torch.zeros_like(x), x, statistics, _weights(x).float(), False, False
    )
    return statistics, gradient


def _weights(x: Tensor) -> Tensor:
    """Return weights that bring all terms of the gradient into the range of float16."""
    return torch.full((len(x),), x.shape[1] ** 0.5, dtype=torch.float64, device=x.device)


def _check(machine: Machine, x: Tensor) -> None:
    machine.poison(max(8 * x.numel(), 1 << 16))
    statistics, gradient = _both(x)
    wide, host = x.cpu().double(), x.cpu()
    expected = reference.outlier_statistics(wide, len(wide), False)
    rough = reference.outlier_statistics(host, len(host), False)
    statistics, where = statistics.cpu(), f"{x.dtype} {tuple(x.shape)}"
    assert torch.equal(statistics[:, COUNTED], rough[:, COUNTED]), f"maxima or medians: {where}"
    # a mean near zero is what is left of numbers as large as the deviation
    scale = expected.abs().maximum(expected[:, reference.DEVIATION, None])
    off = (statistics.double() - expected).abs() / scale.clamp(min=1e-300)
    off[:, COUNTED] = 0
    assert (off <= STATISTICS_GATE).all(), f"statistics are off by {off.max():.2g}: {where}"
    theirs = reference.outlier_statistics_backward(
        torch.zeros_like(wide), wide, expected, _weights(wide), False, False
    )
    assert _near(gradient, theirs, theirs.square().mean().sqrt()), f"gradient: {where}"
    _check_fake_quant(x, where)


def _check_padded(x: Tensor) -> None:
    """Compare tensors whose samples end, or begin, with padding."""
    samples, tokens, width = x.shape
    length = torch.arange(samples) * tokens // max(samples - 1, 1)
    begin = (tokens - length) * (torch.arange(samples) % 2)
    ranges = (torch.stack([begin, length], 1) * width).to(x.device)
    statistics = triton_kernels.outlier_statistics(x, samples, False, ranges)
    expected = reference.outlier_statistics(x.cpu(), samples, False, ranges.cpu())
    where = f"padded {x.dtype} {tuple(x.shape)}"
    assert torch.equal(statistics.cpu()[:, COUNTED], expected[:, COUNTED]), where
    share = _weights(x.flatten(1)).float()
    options = torch.zeros_like(x), x, statistics, share, False, False, ranges
    gradient = triton_kernels.outlier_statistics_backward(*options)
    wide = (tensor.cpu().double() for tensor in options[:4])
    theirs = reference.outlier_statistics_backward(*wide, False, False, ranges.cpu())
    assert _near(gradient, theirs, theirs.square().mean().sqrt()), where


def _check_fake_quant(x: Tensor, where: str) -> None:
    scale = torch.tensor([SCALE], device=x.device)
    ours = triton_kernels.fake_quant(x, scale, QMIN, QMAX, None).cpu()
    theirs = reference.fake_quant(x.cpu(), scale.cpu(), QMIN, QMAX, None)
    # the interpreter cuts a float32 to bfloat16 where a GPU rounds it
    same = torch.equal(ours, theirs) if x.is_cuda else _near(ours, theirs.double())
    assert same, f"fake_quant: {where}"
    grad = torch.ones_like(x)
    ours = triton_kernels.fake_quant_backward(grad, x, scale, QMIN, QMAX, None).cpu()
    theirs = reference.fake_quant_backward(grad.cpu(), x.cpu(), scale.cpu(), QMIN, QMAX, None)
    assert torch.equal(ours, theirs), f"fake_quant_backward: {where}"


def _near(actual: Tensor, expected: Tensor, least: Tensor | float = 0.0) -> bool:
    """Compare relative to each element, or to `least` where its terms cancel."""
    rounding = 1 if actual.is_cuda or actual.dtype != torch.bfloat16 else 2  # the interpreter cuts
    off = (actual.cpu().double() - expected).abs()
    return bool((off <= rounding * GATE[actual.dtype] * expected.abs().clamp(min=least)).all())


def _check_repeats(machine: Machine, dtype: torch.dtype, repeats: int) -> None:
    x = eager.normal((2, 5_001) if machine.dry else (16, 1_000_003), dtype, machine.device)
    first = _both(x)
    machine.synchronize()
    side = None if machine.dry else torch.cuda.Stream()
    for repeat in range(repeats):
        stream: AbstractContextManager = nullcontext()
        if side is not None and repeat % 2:
            stream = torch.cuda.stream(side)
        with stream:
            again = _both(x)
        machine.synchronize()
        for actual, wanted in zip(again, first, strict=True):
            assert torch.equal(actual, wanted), f"{dtype}: other bits at repeat {repeat}"


if __name__ == "__main__":  # under compute-sanitizer
    gpu = Machine(dry=False)
    for each in DTYPES.values():
        for small in (*SHAPES, GPU_SHAPES[0]):
            _check(gpu, _rows(gpu, "outlier", small, each))
