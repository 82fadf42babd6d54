"""Quantize SmolLM2 or Whisper in many ways, and measure what their demos do on held-out rows.

python -m benchmarks.accuracy.ways smollm2 --out benchmarks/results/xeon-2-cores
python -m benchmarks.accuracy.ways smollm2 --out DIR --split test --seeds 3 --only "W8A8*rotate*"
python -m benchmarks.accuracy.ways smollm2 --out DIR --arm paper --only float
python -m benchmarks.accuracy.ways whisper --out DIR --split test --only "W8A8 linear inputs: mse"

A way takes minutes, on test rows seven times as long as on validation rows. What is in the file
already is not measured again, so that an interrupted run goes on. A seed draws the rows that ranges
are taken from, and those that are tuned on. docs/results.md has the table.
"""

import copy
import json
import time
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase
from functools import cache, partial
from typing import Any

from torch import nn

import quanttune as qt
from benchmarks import arguments
from quanttune.demo import recipe
from quanttune.demo.experiment import Arm
from quanttune.demo.training import train
from quanttune.environment import environment
from quanttune.files import write_json
from quanttune.quantization.methods import QERA, SmoothInputs, SmoothQuant
from quanttune.quantization.state import is_quantized, weight_quantizers

WIDTHS: dict[str, dict[str, int]] = {
    "W8A8": {"bits": 8},
    "W7A7": {"bits": 7},
    "W6A6": {"bits": 6},
    "W6A8": {"weight_bits": 6},
    "W4A8": {"weight_bits": 4},
    "W4A4": {"bits": 4},
    "W4A16": {"weight_bits": 4},
    "W3A16": {"weight_bits": 3},
}
INPUTS, LINEAR, SUMS_IN_FLOAT, EVERYTHING = (
    {"coverage": "linear_inputs"},
    {"coverage": "linear"},
    {"coverage": "full_no_softmax", "residual": False},
    {"coverage": "full_no_softmax"},
)
COVERAGES = {
    "linear inputs": INPUTS,
    "linear": LINEAR,
    "all but sums": SUMS_IN_FLOAT,
    "everything": EVERYTHING,
    # the head shares its weight with the embeddings, which stay in float
    "weights in groups of 64": {
        "coverage": "weight_only",
        "weights": 64,
        "overrides": {"lm_head": None},
    },
}
DOWN = {"overrides": {"*.down_proj.input_quantizer": {"bits": 16}}}
# of attention: over many tokens most are less than half of a step
PROBABILITIES = {"overrides": {"*_probability_quantizer": None}}
ROTATED: dict[str, Any] = {"methods": ["rotate"]}
SMOOTHED = ["smooth_inputs", SmoothQuant(alpha=0.9)]
# what is done beside coverage and min-max
REMEDIES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "mse": {"calibrator": "mse"},
    "omse": {"calibrator": "omse"},
    "percentile": {"calibrator": "percentile"},
    "zero points": {"symmetric": False},
    "smooth_inputs": {"methods": ["smooth_inputs"]},
    "erq": {"methods": ["erq"]},
    "gptq": {"methods": ["gptq"]},
    "oac": {"methods": ["oac"]},
    "awq": {"methods": ["awq"]},
    "weight_clipping": {"methods": ["weight_clipping"]},
    "awq, weight_clipping": {"methods": ["awq", "weight_clipping"]},
    "awq, gptq": {"methods": ["awq", "gptq"]},
    "qera": {"methods": ["qera"]},
    "qera-approx": {"methods": [QERA(weighting="diagonal")]},
    "lqer": {"methods": [QERA(weighting="magnitude")]},
    "zeroquant-v2": {"methods": [QERA(weighting="none")]},
    "gwq": {"methods": ["gwq"]},
    "peg": {"methods": ["peg"]},
    "llm_int8": {"methods": ["llm_int8"], "calibrator": "dynamic"},
    "dynamic, a scale per tensor": {"calibrator": "dynamic"},
    "inputs of down_proj at 16 bits": DOWN,
    "probabilities in float": PROBABILITIES,
    "rotate": ROTATED,
    "rotate, mse": {**ROTATED, "calibrator": "mse"},
    "rotate, omse": {**ROTATED, "calibrator": "omse"},
    "rotate, smooth_inputs": {"methods": ["rotate", "smooth_inputs"]},
    "rotate, smooth_inputs .8": {"methods": ["rotate", SmoothInputs(alpha=0.8)]},
    "rotate, erq": {"methods": ["rotate", "erq"]},
    "rotate, zero points": {**ROTATED, "symmetric": False},
    "rotate, inputs of down_proj at 16 bits": {**ROTATED, **DOWN},
    "smoothed": {"methods": SMOOTHED},
    "rotate, smooth_inputs, smoothquant": {"methods": ["rotate", "smooth_inputs", "smoothquant"]},
    "rotate, smoothed": {"methods": ["rotate", *SMOOTHED]},
    "rotate, smoothed, erq": {"methods": ["rotate", *SMOOTHED, "erq"]},
    "rotate, smoothed, mse": {"methods": ["rotate", *SMOOTHED], "calibrator": "mse"},
    "rotate, smoothed, erq, zero points": {
        "methods": ["rotate", *SMOOTHED, "erq"],
        "symmetric": False,
    },
}
GROUPED = "W4A16 weights in groups of 64"
OF_GROUPS = COVERAGES["weights in groups of 64"]


def _trained_outliers(model: nn.Module, job: Any, rate: float) -> None:
    """Let the floats among the codes learn what the float model answers, as long as an arm."""
    qt.learn_outliers(model)
    train(model, Arm("prequant", "", rate), job.steps, job._distillation_loss)


def _requantized(model: nn.Module, _: Any, **options: Any) -> None:
    qt.requantize(model, weight_bits=4, **options)


# what is done after `quantize`
STAGES: dict[str, tuple[dict[str, Any], Callable[[nn.Module, Any], None]]] = {
    f"{GROUPED}: prequant, {rate:g}": (
        {"weight_bits": 4, **OF_GROUPS, "methods": ["prequant"]},
        partial(_trained_outliers, rate=rate),
    )
    for rate in (1e-4, 1e-3, 1e-2)
} | {
    # of min-max the float weights are still there: it would be nearest rounding at 4 bits
    f"{GROUPED}: gptq at 8 bits, requantized{name}": (
        {"weight_bits": 8, **OF_GROUPS, "methods": ["gptq"]},
        partial(_requantized, **options),
    )
    for name, options in (("", {}), (", rows' sums kept", {"correct_weights": True}))
}
PREFIX = "kept prefix; "
FLOATS = ("float", f"{PREFIX}float")


def ways() -> dict[str, dict[str, Any] | None]:
    """Return the options of `quantize` by names; None for a model that stays float."""
    quantized: dict[str, dict[str, Any] | None] = {
        f"{width} {coverage}: {prefix}{remedy}": {**bits, **covered, **options}
        for width, bits in WIDTHS.items()
        for coverage, covered in COVERAGES.items()
        for prefix in ("", PREFIX)
        for remedy, options in REMEDIES.items()
    }
    stages = {name: options for name, (options, _) in STAGES.items()}
    return dict.fromkeys(FLOATS) | quantized | stages


def main() -> None:
    parser = arguments.of_folder(__doc__)
    parser.add_argument("task", choices=("smollm2", "whisper"))
    parser.add_argument("--split", choices=("validation", "test"), default="validation")
    parser.add_argument("--only", action="append", help="a pattern of ways (fnmatch); repeat it")
    parser.add_argument("--arm", default="base", help="of the demo")
    parser.add_argument("--seeds", type=int, default=1, help="how many, from 0")
    options = parser.parse_args()
    path = options.out / f"{options.task}.json"
    results = json.loads(path.read_text()) if path.exists() else {"rows": []}
    patterns = options.only or ["W8A8 linear: *"]
    chosen = {
        name: way
        for name, way in ways().items()
        if any(fnmatchcase(name, pattern) for pattern in patterns)
    }
    for seed in range(options.seeds):
        job = recipe(options.task)(seed)
        arms = {arm.name: arm for arm in job.arms}
        if options.arm not in arms:
            parser.error(f"--arm must be one of {', '.join(arms)}, got {options.arm}")
        facts = {"task": options.task, "metric": job.metric, "caveats": job.caveats[1:-1]}
        results |= {**facts, "environment": environment()}
        row = {"seed": seed, "arm": options.arm, "split": options.split}
        left = {name: way for name, way in chosen.items() if not _is_in(results["rows"], row, name)}
        for found in _measured(job, arms[options.arm], options.split, left):
            results["rows"].append(row | found)
            print(results["rows"][-1], flush=True)
            write_json(path, results)


def _is_in(rows: list[Any], row: Mapping[str, Any], way: str) -> bool:
    return any((row | {"way": way}).items() <= found.items() for found in rows)


def _measured(job: Any, arm: Arm, split: str, ways: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    @cache
    def prepared() -> nn.Module:
        return job.prepare(arm, lambda: None)

    for way, options in ways.items():
        began = time.monotonic()
        model = copy.deepcopy(prepared())
        if PREFIX in way:
            qt.prefix(model, data=job.calibration())
        if options is not None:
            qt.quantize(model, data=job.calibration(), **options)
        if way in STAGES:
            STAGES[way][1](model, job)
        found = {"way": way, **job.measure(model, split), "bytes": _bytes(model)}
        yield found | {"seconds": round(time.monotonic() - began)}


def _bytes(model: nn.Module) -> int:
    """Return what the parameters take, codes and scales as they would be stored, others float32."""
    size = sum(p.numel() * 4 for p in model.parameters())
    for holder, quantizer in weight_quantizers(model).values() if is_quantized(model) else ():
        weight = holder.weight
        size += weight.numel() * quantizer.bits // 8 - 4 * weight.numel()
        size += 4 * quantizer.scale_of(weight).numel()
        if quantizer.outliers is not None:  # 16 bits and a place, not 32 bits
            size += 2 * len(quantizer.outliers.positions)
        if getattr(getattr(holder, "input_quantizer", None), "grid", "") == "outlier_columns":
            size += 2 * weight.numel()  # kept in 16 bits beside the codes
    return size


if __name__ == "__main__":
    main()
