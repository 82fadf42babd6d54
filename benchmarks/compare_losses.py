"""Compare the outlier losses on a demo's job: settings on validation rows, then seeds on test rows.

python benchmarks/compare_losses.py minilm --seeds 3 --out benchmarks/results/xeon-2-cores

With --every, the detached variant is observed at every 2nd and 4th step only, instead.

Every arm has the demo's budget of steps. For each loss the settings with the best mean over the
demo's widths (min-max, weights per channel, seed 0) are measured with all seeds, beside the
demo's control, the paper's loss and its detached variant, whose settings were chosen alike.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import arguments
from choose_settings import validation_row

from quanttune.demo import recipe
from quanttune.demo.experiment import Arm, run
from quanttune.environment import environment
from quanttune.files import write_json
from quanttune.losses import HingeRatio, Kurtosis, LogRatio, OutlierLoss, Tweo

BESIDE = ("base", "control", "paper", "detached")
DETACHED = {"detach_deviation": True}
# name, loss, whether its deviation is detached, and the alphas to try. MiniLM's task loss begins at
# 0, so nothing can be balanced against it.
CANDIDATES: list[tuple[str, OutlierLoss, dict[str, bool], tuple[float, ...]]] = [
    ("hinge", HingeRatio(4.0), DETACHED, (0.5,)),
    ("hinge", HingeRatio(8.0), DETACHED, (0.5,)),
    ("log ratio", LogRatio(), DETACHED, (0.5, 0.9, 0.97)),
    ("kurtosis", Kurtosis(), {}, (1e-6, 1e-5, 1e-4)),
    ("tweo", Tweo(), {}, (0.01, 0.1, 0.5)),
]
EVERY = (2, 4)
RATES = {"minilm": (3e-4, 6e-4), "digits": (1e-3, 2e-3)}


def main() -> None:
    parser = arguments.of_task(__doc__, RATES)
    parser.add_argument("--every", action="store_true", help="compare how often to observe")
    options = parser.parse_args()
    make = recipe(options.task)
    arms = [arm for arm in make.arms if arm.name in BESIDE]
    if options.every:
        detached = next(arm for arm in arms if arm.name == "detached")
        for k in EVERY:
            summary = f"detached, observed at every {k}th step"
            arms.append(replace(detached, name=f"every {k}", summary=summary, observe_every=k))
    else:
        path = options.out / f"settings-losses-{options.task}.json"
        arms += _best(make(seed=0), RATES[options.task], path)
    results = run(_with_arms(make, arms), options.seeds, lambda text, units: None)
    name = "every" if options.every else "losses"
    write_json(options.out / f"{name}-{options.task}.json", results.as_dict())


def _best(job: Any, rates: tuple[float, ...], path: Path) -> list[Arm]:
    """Return the best arm of each name; what was measured is kept in a file."""
    settings = {"task": job.name, "seed": 0, "rows": [], "environment": environment()}
    if path.exists():  # of a comparison that was interrupted
        settings["rows"] = json.loads(path.read_text())["rows"]
    known = {row["arm"]: row for row in settings["rows"]}
    best: dict[str, tuple[float, Arm]] = {}
    for arm in _candidates(rates):
        if arm.summary not in known:
            known[arm.summary] = validation_row(job, arm) | {"arm": arm.summary}
            settings["rows"].append(known[arm.summary])
            write_json(path, settings)
        score = mean(known[arm.summary][f"W{bits}A{bits}"] for bits in job.bits)
        if arm.name not in best or score > best[arm.name][0]:
            best[arm.name] = score, arm
    return [arm for _, arm in best.values()]


def _candidates(rates: tuple[float, ...]) -> Iterator[Arm]:
    for name, loss, options, alphas in CANDIDATES:
        for alpha in alphas:
            for rate in rates:
                summary = f"{loss}, alpha {alpha:g}, learning rate {rate:g}"
                yield Arm(name, summary, rate, alpha, loss=loss, **options)


def _with_arms(make: Any, arms: list[Arm]) -> Any:
    return type(make.__name__, (make,), {"arms": tuple(arms)})


if __name__ == "__main__":
    main()
