"""Measure every row of the speed table in one run, and print it beside bar and goal.

python -m benchmarks.kernels.ratios --json cpu-ratios.json

Answers are checked before anything is timed. Ours and the rival take turns, a ratio is that of the
median times, and what counts is the median of the ratios of all runs.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import quanttune
from benchmarks import eager
from benchmarks.bars import BARS
from benchmarks.kernels import calibration, minilm_step, observed_step
from benchmarks.provenance import commit
from benchmarks.timing import medians
from quanttune import ops
from quanttune.environment import environment
from quanttune.files import write_json
from quanttune.fused_observer import outlier_ratio
from quanttune.reference import RATIO, SAMPLE_SIZE

LARGE, SMALL, TINY = (8, 2**20), (16, 36_864), (1, 1024)
SECONDS = 1.5  # of turns per row and dtype, where seven samples do not take longer
LONG, SHORT = (16, 128), (16, 24)  # rows x tokens of a MiniLM step: the table's, and the demo's
SCALE = torch.tensor(0.03)
NOTES = {
    "minilm_step_overhead": "16 x 128 tokens; forward, loss, backward, AdamW(fused=True)",
    "minilm_memory_overhead": "16 x 128 tokens; forward, loss, backward",
    "statistics_under_load": "both before and during; two processes that add numbers, on two cores",
    "smollm2_step_overhead": "random weights of its shape; forward, loss, backward, SGD",
    "omse_vs_loop": "15,000,000 elements, 90 ranges, 8 bits",
    "calibrate_vs_forward": "2 x 10 images, full coverage; the slowest of those of ranges",
    "search_vs_forward": "2 x 10 images, full coverage; the slowest of the searches",
}
UNITLESS = ("minilm_memory_overhead", "statistics_under_load")
Times = dict[str, dict[str, dict[str, float]]]  # key, dtype, who: milliseconds, or MiB


def main() -> None:
    options = _options()
    torch.set_grad_enabled(True)
    for name, dtype in eager.DTYPES.items():
        _progress(f"check {name}")
        _check(dtype)
    minilm_step.check()
    calibration.check()
    runs, times = [], []
    for run in range(options.runs):
        times.append(_measure(f"run {run + 1} of {options.runs}: "))
        runs.append(_ratios(times[-1]))
    _progress("for reference")
    others = _others()
    ratios = {
        key: {name: median(run[key][name] for run in runs) for name in names}
        for key, names in runs[0].items()
    }
    missed = [
        f"{key} {name}: {value:.2f}x, bar {BARS[key].text()}"
        for key, values in ratios.items()
        for name, value in values.items()
        if not BARS[key].met(value, name)
    ]
    _print(ratios, runs, others)
    if options.json:
        result = {
            "device": "cpu",
            "environment": environment(),
            "allocator": {key: os.environ[key] for key in os.environ if "MALLOC_" in key},
            "commit": commit(),
            "ratios": ratios,
            "runs": runs,
            "milliseconds": [
                {key: run[key] for key in run if key not in UNITLESS} for run in times
            ],
            "mebibytes": [run["minilm_memory_overhead"] for run in times],
            "others": others,
            "notes": NOTES,
            "missed": missed,
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.json, result)
    for line in missed:
        print(f"missed: {line}")
    sys.exit(1 if missed and options.strict else 0)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write everything that was measured here")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if a bar is missed")
    return parser.parse_args()


def _check(dtype: torch.dtype) -> None:
    for shape in (LARGE, SMALL):
        x = eager.normal(shape, dtype)
        exact = shape[1] <= SAMPLE_SIZE
        eager.check_ratio(ops.outlier_statistics(x, len(x), False)[:, RATIO], x, exact)
        eager.check_gradient(eager.gradient(outlier_ratio, x), x)
    x = eager.normal(LARGE, dtype)
    eager.check_fake_quant(quanttune.fake_quant(x, SCALE), x, SCALE)
    eager.check_fake_quant(_torch_fake_quant(x), x, SCALE, ours=False)
    y = x.clone()
    quanttune.fake_quant_(y, SCALE, bits=8)
    eager.check_fake_quant(y, x, SCALE)


def _torch_fake_quant(x: Tensor) -> Tensor:
    return torch.fake_quantize_per_tensor_affine(x, SCALE.item(), 0, -128, 127)


def _measure(title: str) -> Times:
    """Measure every row once: ours first, then what it is compared with."""
    times: Times = {key: {} for key in BARS}
    for name, dtype in eager.DTYPES.items():
        for key, calls in _calls(dtype).items():
            _progress(f"{title}{key} {name}")
            times[key][name] = medians(calls, SECONDS)
        times["statistics_under_load"][name] = _loaded(times["statistics_vs_read"][name], dtype)
    _progress(f"{title}minilm")
    variants = ("with", "without")
    times["minilm_step_overhead"]["float32"] = minilm_step.times(variants, *LONG, seconds=20)
    times["minilm_short_overhead"]["float32"] = minilm_step.times(variants, *SHORT, seconds=6)
    times["minilm_memory_overhead"]["float32"] = {
        variant: minilm_step.memory(variant, *LONG) for variant in variants
    }
    _progress(f"{title}smollm2")
    found = observed_step.step_times(*observed_step.smollm2(4, 128), seconds=20)
    times["smollm2_step_overhead"]["float32"] = {who: found[who] for who in ("observed", "plain")}
    _progress(f"{title}calibration")
    times["omse_vs_loop"]["float32"] = calibration.search_times()
    for key, slowest in calibration.calibration_times().items():
        times[key]["float32"] = slowest
    return times


def _calls(dtype: torch.dtype) -> dict[str, dict[str, Callable[[], Any]]]:
    large, small = eager.normal(LARGE, dtype), eager.normal(SMALL, dtype)
    changed, target = large.clone(), torch.empty_like(large)
    statistics = partial(ops.outlier_statistics, large, len(large), False)
    return {
        "statistics_vs_eager": {"ours": statistics, "eager": partial(eager.ratio, large)},
        "statistics_small_vs_eager": {
            "ours": partial(ops.outlier_statistics, small, len(small), False),
            "eager": partial(eager.ratio, small),
        },
        "statistics_vs_read": {"ours": statistics, "read": large.sum},
        "step_vs_eager": {
            "ours": partial(eager.gradient, outlier_ratio, large),
            "eager": partial(eager.gradient, eager.ratio, large),
        },
        "fake_quant_vs_torch": {
            "ours": partial(quanttune.fake_quant, large, SCALE),
            "torch": partial(_torch_fake_quant, large),
        },
        "fake_quant_inplace_vs_copy": {
            "ours": partial(quanttune.fake_quant_, changed, SCALE, bits=8),
            "copy": partial(target.copy_, large),
        },
    }


def _loaded(alone: dict[str, float], dtype: torch.dtype) -> dict[str, float]:
    """Return how many times longer statistics and a read take beside as many busy processes."""
    calls = _calls(dtype)["statistics_vs_read"]
    command = [sys.executable, "-c", "while True: sum(range(1000))"]
    busy = [subprocess.Popen(command) for _ in range(torch.get_num_threads())]
    try:
        beside = medians(calls, SECONDS)
    finally:
        for process in busy:
            process.kill()
            process.wait()
    return {name: beside[name] / alone[name] for name in calls}


def _ratios(times: Times) -> dict[str, dict[str, float]]:
    ratios: dict[str, dict[str, float]] = {key: {} for key in BARS}
    for key, bar in BARS.items():
        for name, values in times[key].items():
            ours, rival, *_ = values.values()
            ratios[key][name] = rival / ours if bar.at_least else ours / rival
    return ratios


def _others() -> dict[str, float]:
    """Measure, once, what has no bar: the demo's short rows, and plain autograd."""
    large = eager.normal(LARGE, torch.float32)
    cold = medians(
        {
            "ours": partial(ops.outlier_statistics, large, len(large), False),
            "eager": partial(eager.ratio, large),
            "read": large.sum,
            "eager again": partial(eager.ratio, large),
        },
        SECONDS,
        shortest=0,
    )
    row = eager.normal(TINY, torch.float32)
    tiny = medians(
        {
            "ours": partial(ops.outlier_statistics, row, 1, False),
            "eager": partial(eager.ratio, row),
        },
        SECONDS,
    )
    short = minilm_step.times(("without", "plain"), *SHORT, seconds=0)
    long = minilm_step.times(("without", "plain"), *LONG, seconds=0)
    base = minilm_step.memory("without", *LONG)
    return {
        "statistics_vs_eager float32, 1 x 1,024, time": tiny["ours"] / tiny["eager"],
        "statistics_vs_eager float32, not in cache": cold["eager"] / cold["ours"],
        "statistics_vs_read float32, not in cache": cold["ours"] / cold["read"],
        "minilm_step_overhead, 16 x 24, plain": short["plain"] / short["without"],
        "minilm_step_overhead, 16 x 128, plain": long["plain"] / long["without"],
        "minilm_memory_overhead, 16 x 128, plain": minilm_step.memory("plain", *LONG) / base,
    }


def _print(
    ratios: dict[str, dict[str, float]],
    runs: list[dict[str, dict[str, float]]],
    others: dict[str, float],
) -> None:
    table = Table(title=f"CPU, {torch.get_num_threads()} threads, median of {len(runs)} run(s)")
    for column in ("what", *eager.DTYPES, "bar", "goal"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for key, bar in BARS.items():
        cells = []
        for name in eager.DTYPES:
            value = ratios[key].get(name)
            text = "" if value is None else f"{value:.2f}x"
            if value is not None and not bar.met(value, name):
                text += " missed"
            cells.append(text)
        table.add_row(bar.what, *cells, bar.text(), bar.text(goal=True))
    for what, value in others.items():
        table.add_row(what, f"{value:.2f}x", style="dim")
    console = Console(width=None if sys.stdout.isatty() else 110)
    console.print(table)


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
