"""Refit, tuning and finishing together and apart: a demo's job at each width, with and without
methods.

python -m benchmarks.accuracy.refitting minilm --seeds 3 --out benchmarks/results/epyc-2-cores
python -m benchmarks.accuracy.refitting minilm --choose --out DIR   # settings, validation rows

A run that was interrupted goes on where it stopped.
"""

import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from itertools import product
from typing import Any

from benchmarks import arguments
from quanttune.demo import recipe
from quanttune.demo.experiment import FLOAT_BITS, Arm
from quanttune.environment import environment
from quanttune.files import write_json
from quanttune.quantization.methods import SmoothInputs
from quanttune.quantization.simulation import quantize

BASE, REFIT = Arm("base", "untrained"), Arm("refit", "untrained", refit=0.1)
DETACHED = Arm("detached", "deviation held constant", alpha=0.5, detach_deviation=True)
REFITTED = replace(DETACHED, name="refit, detached", refit=0.1)
FINISHED = replace(
    REFITTED,
    name="refit, detached, finished",
    refit=0.25,
    learning_rate=4e-4,
    finish_steps=120,
    finish_bits=(8, 6),
)
CONTROL = replace(FINISHED, name="refit, alpha = 0, finished", alpha=0)
TUNED = replace(DETACHED, alpha=0.3, learning_rate=2e-3)
ROUNDED = replace(TUNED, name="detached, finished", finish_steps=93, finish_bits=(5, 4))
# steps and arms; their rates were chosen on validation rows, for minilm at alpha = 0 there is no
# loss without a refit, so that its control is the base
CHOSEN: dict[str, list[tuple[int, Arm]]] = {
    "minilm": [
        (90, BASE),
        (90, REFIT),
        (90, replace(REFITTED, learning_rate=3e-4)),
        (240, replace(REFITTED, learning_rate=3e-4)),
        (240, FINISHED),
        (90, replace(DETACHED, learning_rate=4e-4)),
        (240, replace(DETACHED, learning_rate=3e-4)),
        (240, CONTROL),
    ],
    "digits": [
        (186, BASE),
        (186, TUNED),
        (186, ROUNDED),
        (186, replace(ROUNDED, name="alpha = 0, finished", alpha=0, learning_rate=3e-3)),
        (186, replace(ROUNDED, name="refit, detached, finished", refit=0.1)),
    ],
}
REFIT_ROWS = 640  # more than the demo takes time for
# what is tried with --choose, and on how many seeds: the validation rows of digits are 150
RATES = {"minilm": (3e-4, 4e-4, 6e-4), "digits": (1e-3, 2e-3, 3e-3)}
CHOSEN_ON = {"minilm": 1, "digits": 2}
METHODS: dict[str, Any] = {"calibrator": "omse", "methods": ["repq", "erq"]}
PERCENTILE: dict[str, Any] = {"calibrator": "percentile"}
BITS = {"minilm": (8, 7, 6), "digits": (8, 7, 6, 5, 4)}
WAYS: dict[str, Mapping[str, dict[str, Any]]] = {
    "minilm": {"minmax": {}, "omse, repq, erq": METHODS},
    "digits": {"minmax": {}, "percentile": PERCENTILE, "omse": {"calibrator": "omse"}},
}


def _smoothed(coverage: str, end: str, smoothing: Any = "smooth_inputs") -> dict[str, Any]:
    methods = [smoothing, "repq", "erq"]
    return {"coverage": coverage, "symmetric": end != ZERO_POINTS, "methods": methods}


PLAIN, ZERO_POINTS = "repq, erq", "repq, erq, zero points"
LINEAR = {"coverage": "linear", "symmetric": False}
OF_UNTRAINED: dict[str, Any] = {
    "percentile": PERCENTILE,
    f"linear, omse, {ZERO_POINTS}": {**METHODS, **LINEAR},
}
SMOOTHED = {
    f"{coverage}, smooth_inputs, {end}": _smoothed(coverage, end)
    for coverage in ("linear_inputs", "linear", "linear_embedding")
    for end in (PLAIN, ZERO_POINTS)
}
# at 6 bits activations want all that weights can take
SMOOTHED[f"linear_inputs, smooth_inputs at 1.0, {PLAIN}"] = _smoothed(
    "linear_inputs", PLAIN, SmoothInputs(alpha=1.0)
)
SMOOTHINGS = {
    f"linear, smooth_inputs at {alpha}, {end}": _smoothed("linear", end, SmoothInputs(alpha=alpha))
    for alpha in (0.8, 0.9, 1.0)
    for end in (PLAIN, ZERO_POINTS)
}


def main() -> None:
    parser = arguments.of_task(__doc__, CHOSEN)
    parser.add_argument("--choose", action="store_true", help="other settings, validation rows")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    options = parser.parse_args()
    task, plans = options.task, CHOSEN[options.task]
    seeds = range(options.first, options.seeds)
    path, split = options.out / f"refit-{task}.json", "test"
    if options.choose:
        path, split = options.out / f"settings-refit-{task}.json", "validation"
        seeds, plans = range(CHOSEN_ON[task]), list(_candidates(task))
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"rows": []}
    results |= {"task": task, "split": split, "environment": environment()}
    for seed in seeds:
        for steps, arm in plans:
            for row in _rows(task, seed, steps, arm, split, results["rows"]):
                results["rows"].append(row)
                write_json(path, results)
                print(row, flush=True)


def _candidates(task: str) -> Iterator[tuple[int, Arm]]:
    """Yield what was chosen from: its kinds, each with several learning rates."""
    for steps, arm in CHOSEN[task]:
        for rate in RATES[task] if arm.learning_rate else (0.0,):
            yield steps, replace(arm, learning_rate=rate)


def _rows(
    task: str, seed: int, steps: int, arm: Arm, split: str, known: list[Any]
) -> Iterator[dict[str, Any]]:
    facts = {"seed": seed, "steps": steps, **_facts(arm)}
    done = [(r["bits"], r["way"]) for r in known if facts.items() <= r.items()]
    pretrained = task == "minilm" and not arm.learning_rate  # the same for each seed
    ways = {**WAYS[task], **(OF_UNTRAINED if pretrained else {})}
    if pretrained and not arm.refit:
        ways |= SMOOTHED if split == "test" else SMOOTHED | SMOOTHINGS
    wanted = [(FLOAT_BITS, "none"), *product(BITS[task], ways)]
    if set(wanted) <= set(done) or (seed and pretrained):
        return
    job = _job(task, steps, seed)
    model = job.prepare(arm, lambda: None)
    for bits, way in (key for key in wanted if key not in done):
        quantized = model
        if bits != FLOAT_BITS:
            options = {"data": job.calibration(), **ways[way]}
            quantized = quantize(copy.deepcopy(model), bits, **options)
        value = job.evaluate(quantized, split)
        yield {**facts, "bits": bits, "way": way, "value": value}


def _facts(arm: Arm) -> dict[str, Any]:
    return {
        "arm": arm.name,
        "refit": arm.refit,
        "learning_rate": arm.learning_rate,
        "finish_steps": arm.finish_steps,
        "finish_bits": list(arm.finish_bits) if arm.finish_steps else [],
    }


@lru_cache(1)
def _job(task: str, steps: int, seed: int) -> Any:
    make: Any = recipe(task)
    return type(make.__name__, (make,), {"steps": steps, "refit_rows": REFIT_ROWS})(seed)


if __name__ == "__main__":
    main()
