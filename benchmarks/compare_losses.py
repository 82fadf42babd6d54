"""Compare the outlier losses on a demo's job: settings on validation rows, then seeds on test rows.

python benchmarks/compare_losses.py minilm --seeds 3 --out benchmarks/results/xeon-2-cores

Every arm has the demo's budget of steps. For each loss the settings with the best mean over the
demo's widths (min-max, weights per channel, seed 0) are measured with all seeds, beside the
demo's control, the paper's loss and its detached variant, whose settings were chosen alike.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

from choose_settings import validation_row

from quanttune.analysis.environment import environment
from quanttune.losses import HingeRatio, Kurtosis, LogRatio, OutlierLoss, Tweo
from quanttune.recipes import recipe
from quanttune.recipes.experiment import Arm, run

BESIDE = ("base", "control", "paper", "detached")
DETACHED = {"detach_deviation": True}
# loss, its name, whether its deviation is detached, and (alpha, balance) to try
CANDIDATES: list[tuple[str, OutlierLoss, dict[str, bool], list[tuple[float, str]]]] = [
    ("hinge 4", HingeRatio(4.0), DETACHED, [(0.5, "none")]),
    ("hinge 8", HingeRatio(8.0), DETACHED, [(0.5, "none")]),
    ("log ratio", LogRatio(), DETACHED, [(0.5, "none"), (0.9, "none"), (0.5, "initial")]),
    ("kurtosis", Kurtosis(), {}, [(0.5, "initial"), (0.1, "initial"), (1e-6, "none")]),
    ("tweo", Tweo(), {}, [(0.01, "none"), (0.1, "none"), (0.5, "initial")]),
]
RATES = {"minilm": (3e-4, 6e-4), "digits": (1e-3, 2e-3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=RATES)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    make = recipe(options.task)
    rows = []
    best: dict[str, tuple[float, Arm]] = {}
    job = make(seed=0)
    for arm in _candidates(RATES[options.task]):
        row = validation_row(job, arm)
        print(row, flush=True)
        rows.append(row | {"arm": arm.summary})
        score = mean(row[f"W{bits}A{bits}"] for bits in job.bits)
        family = arm.name.split()[0]
        if family not in best or score > best[family][0]:
            best[family] = score, arm
    settings = {"task": options.task, "seed": 0, "rows": rows, "environment": environment()}
    _write(options.out / f"settings-losses-{options.task}.json", settings)
    arms = [arm for arm in make.arms if arm.name in BESIDE]
    arms += [arm for _, arm in best.values()]
    results = run(_with_arms(make, arms), options.seeds, lambda text, units: None)
    _write(options.out / f"losses-{options.task}.json", results.as_dict())


def _candidates(rates: tuple[float, ...]) -> Iterator[Arm]:
    for name, loss, options, weights in CANDIDATES:
        for alpha, balance in weights:
            for rate in rates:
                summary = f"{loss}, alpha {alpha:g}, balance {balance}, learning rate {rate:g}"
                yield Arm(name, summary, rate, alpha, balance, loss, **options)


def _with_arms(make: Any, arms: list[Arm]) -> Any:
    return type(make.__name__, (make,), {"arms": tuple(arms)})


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
