"""Choose the learning rates of a demo's arms on its validation rows: each at the width it is meant
for.

python -m benchmarks.accuracy.choose_settings minilm --json benchmarks/results/settings-minilm.json
"""

import argparse
import copy
import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

from quanttune.demo import recipe
from quanttune.demo.experiment import Arm
from quanttune.environment import environment
from quanttune.files import write_json
from quanttune.quantization.requantization import requantize
from quanttune.quantization.simulation import quantize

RATES = {"minilm": (1e-4, 3e-4, 5e-4), "digits": (3e-4, 1e-3, 2e-3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=RATES)
    parser.add_argument("--arms", nargs="*", help="only these")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    job = recipe(options.task)(seed=0)
    rows = []
    for arm in job.arms:
        if not arm.learning_rate or (options.arms and arm.name not in options.arms):
            continue
        for rate in RATES[options.task]:
            row = validation_row(job, replace(arm, learning_rate=rate))
            print(row, flush=True)
            rows.append(row)
    result = {"task": options.task, "seed": 0, "rows": rows, "environment": environment()}
    write_json(options.json, result)


def best_of(candidates: Iterable[Arm], job: Any, path: Path) -> list[Arm]:
    """Return the best arm of each name, by the mean over a job's widths on its validation rows.

    What was measured is kept in a file, by summary, and not measured again.
    """
    settings = {"task": job.name, "seed": 0, "rows": [], "environment": environment()}
    if path.exists():  # of a comparison that was interrupted
        settings["rows"] = json.loads(path.read_text())["rows"]
    known = {row["arm"]: row for row in settings["rows"]}
    best: dict[str, tuple[float, Arm]] = {}
    for arm in candidates:
        if arm.summary not in known:
            known[arm.summary] = validation_row(job, arm) | {"arm": arm.summary}
            settings["rows"].append(known[arm.summary])
            write_json(path, settings)
        score = mean(known[arm.summary][f"W{bits}A{bits}"] for bits in job.bits)
        if arm.name not in best or score > best[arm.name][0]:
            best[arm.name] = score, arm
    return [arm for _, arm in best.values()]


def validation_row(job: Any, arm: Arm) -> dict[str, Any]:
    """Tune an arm and return its metric on the validation rows: float, then min-max."""
    model = job.prepare(arm, lambda: None)
    row = {
        "arm": arm.name,
        "steps": job.steps,
        "learning_rate": arm.learning_rate,
        "fp32": job.evaluate(model, "validation"),
    }
    quantized = quantize(copy.deepcopy(model), data=job.calibration())
    for bits in job.bits:
        requantize(quantized, bits, "channel")
        row[f"W{bits}A{bits}"] = job.evaluate(quantized, "validation")
    return row


def with_arms(make: Any, arms: list[Arm]) -> Any:
    """Return a job that compares these arms."""
    return type(make.__name__, (make,), {"arms": tuple(arms)})


if __name__ == "__main__":
    main()
