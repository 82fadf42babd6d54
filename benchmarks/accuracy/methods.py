"""Quantize a demo's arms by the methods of quanttune.quantization.methods, alone and together.

python -m benchmarks.accuracy.methods minilm --seeds 3 --out benchmarks/results/xeon-2-cores

On the test rows, weights per channel; the methods on min-max, with their default options, none of
which was chosen here; beside them the other calibrators without a method. A run that was
interrupted goes on where it stopped.
"""

import copy
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

from benchmarks import arguments
from quanttune.demo import recipe
from quanttune.demo.experiment import Arm
from quanttune.environment import environment
from quanttune.files import write_json
from quanttune.quantization.methods import GPTQ, METHODS, PTQ4ViT
from quanttune.quantization.simulation import quantize

# the control of minilm is its base: at alpha = 0 its loss is zero
ARMS = {
    "minilm": ("base", "detached", "recipe"),
    "digits": ("base", "control", "detached", "recipe"),
}
WIDTHS = ((8, 8), (6, 6), (4, 8), (4, 4))  # of weights and of activations
COVERAGES = ("full_no_softmax", "linear")
VARIANTS = {
    "gptq (fisher)": GPTQ(hessian="fisher"),
    "ptq4vit (one range)": PTQ4ViT(twin=False),
}
TOGETHER = (
    ("aweq", "bias_correction"),
    ("repq", "erq"),
    ("smoothquant", "gptq"),
)  # two as published
CHOICES = (
    *(("minmax", methods) for methods in ((), *zip((*METHODS, *VARIANTS)), *TOGETHER)),
    *((calibrator, ()) for calibrator in ("percentile", "kl")),
)
LACKING = {("fq_vit",): ("linear",)}  # what it acts on is not rounded
FLOAT = {"coverage": "none", "weight_bits": 32, "bits": 32, "calibrator": "none", "methods": []}


def main() -> None:
    parser = arguments.of_task(__doc__)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument(
        "--only", nargs="*", help="methods, each alone; into some-methods-TASK.json"
    )
    options = parser.parse_args()
    name = "some-methods" if options.only else "methods"
    path, make = options.out / f"{name}-{options.task}.json", recipe(options.task)
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"rows": []}
    results |= {"task": make.name, "metric": make.metric, "environment": environment()}
    for seed in range(options.first, options.seeds):
        for row in _rows(make(seed), seed, results["rows"], options.only):
            results["rows"].append(row)
            write_json(path, results)
            print(row, flush=True)


def _rows(
    job: Any, seed: int, known: list[Any], only: Sequence[str] | None
) -> Iterator[dict[str, Any]]:
    done = [{**row, "value": None, "seconds": None} for row in known]
    for arm in _arms(job):
        ways = [{"seed": seed, "arm": arm.name, **way} for way in (FLOAT, *_ways(only))]
        ways = [way for way in ways if {**way, "value": None, "seconds": None} not in done]
        if not ways or (seed and not arm.learning_rate and job.name == "minilm"):
            continue  # an arm that is not tuned is the same for every seed
        model = job.prepare(arm, lambda: None)
        for way in ways:
            began = time.monotonic()
            quantized = _quantized(job, model, way)
            seconds = round(time.monotonic() - began, 1)
            yield {**way, "value": job.evaluate(quantized), "seconds": seconds}


def _arms(job: Any) -> list[Arm]:
    """Return those of a demo that methods are tried on; a recipe is a refit, then tuning."""
    arms = {arm.name: arm for arm in job.arms}
    arms.setdefault("recipe", replace(arms["detached"], name="recipe", refit=0.1))
    return [arms[name] for name in ARMS[job.name]]


def width(weight_bits: int, bits: int) -> str:
    """Return the usual name of widths, such as W4A8."""
    return f"W{weight_bits}A{bits}"


def way(calibrator: str, methods: Sequence[str]) -> str:
    """Return what a table calls a calibrator with methods."""
    return " + ".join(methods) or calibrator


def _ways(only: Sequence[str] | None) -> Iterator[dict[str, Any]]:
    for coverage, (weight_bits, bits), choice in product(COVERAGES, WIDTHS, CHOICES):
        is_left_out = bool(only and choice[1]) and choice[1] not in {(name,) for name in only or ()}
        if is_left_out or coverage in LACKING.get(choice[1], ()):
            continue
        yield {
            "coverage": coverage,
            "weight_bits": weight_bits,
            "bits": bits,
            "calibrator": choice[0],
            "methods": list(choice[1]),
        }


def _quantized(job: Any, model: Any, way: dict[str, Any]) -> Any:
    if way["coverage"] == "none":
        return model
    return quantize(
        copy.deepcopy(model),
        way["bits"],
        weight_bits=way["weight_bits"],
        calibrator=way["calibrator"],
        coverage=way["coverage"],
        methods=[VARIANTS.get(name, name) for name in way["methods"]],
        data=job.calibration(),
    )


if __name__ == "__main__":
    main()
