"""Refit beside a demo's arms: learning rates on validation rows, then seeds on test rows.

python benchmarks/refitting.py minilm --seeds 3 --out benchmarks/results/epyc-2-cores

Every arm that trains has the demo's steps. The learning rate of each is the one with the best mean
over the demo's widths (min-max, weights per channel, seed 0, validation rows).
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import arguments
from choose_settings import best_of, with_arms

from quanttune.demo import recipe
from quanttune.demo.experiment import Arm, run
from quanttune.files import write_json

RATES = {"minilm": (2e-4, 4e-4, 6e-4), "digits": (5e-4, 1e-3, 2e-3)}
ALPHA = {"minilm": 0.5, "digits": 0.3}
CALIBRATORS = ("minmax", "omse")
UNTRAINED = Arm("refit", "no training", refit=True)


def main() -> None:
    options = arguments.of_task(__doc__, RATES).parse_args()
    make = recipe(options.task)
    path = options.out / f"settings-refit-{options.task}.json"
    untrained = [next(arm for arm in make.arms if arm.name == "base"), UNTRAINED]
    trained = _candidates(make, RATES[options.task], ALPHA[options.task])
    arms = [*untrained, *best_of(trained, make(seed=0), path)]
    results = run(with_arms(make, arms), options.seeds, lambda text, units: None, CALIBRATORS)
    write_json(options.out / f"refit-{options.task}.json", results.as_dict())


def _candidates(make: Any, rates: tuple[float, ...], alpha: float) -> Iterator[Arm]:
    control = next(arm for arm in make.arms if arm.name == "control")
    detached = Arm("detached", "deviation held constant", 0, alpha, detach_deviation=True)
    arms = [] if control.same_as else [control]
    arms += [
        detached,
        Arm("refit, control", "refit, then alpha = 0", refit=True),
        replace(detached, name="refit, detached", summary="refit, then detached", refit=True),
    ]
    for arm in arms:
        for rate in rates:
            summary = f"{arm.summary}, learning rate {rate:g}"
            yield replace(arm, learning_rate=rate, summary=summary)


if __name__ == "__main__":
    main()
