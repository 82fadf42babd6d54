"""Compare the outlier losses on a demo's job: settings on validation rows, then seeds on test rows.

python -m benchmarks.accuracy.compare_losses minilm --seeds 3 --out benchmarks/results/xeon-2-cores

With --every, the detached variant is observed at every 2nd and 4th step only, instead.

Every arm has the demo's budget of steps. For each loss the settings with the best mean over the
demo's widths (min-max, weights per channel, seed 0) are measured with all seeds, beside the
demo's control, the paper's loss and its detached variant, whose settings were chosen alike.
"""

from collections.abc import Iterator
from dataclasses import replace

from benchmarks import arguments
from benchmarks.accuracy.choose_settings import best_of, with_arms
from quanttune.demo import recipe
from quanttune.demo.experiment import Arm, run
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
        arms += best_of(_candidates(RATES[options.task]), make(seed=0), path)
    results = run(with_arms(make, arms), options.seeds, lambda text, units: None)
    name = "every" if options.every else "losses"
    write_json(options.out / f"{name}-{options.task}.json", results.as_dict())


def _candidates(rates: tuple[float, ...]) -> Iterator[Arm]:
    for name, loss, options, alphas in CANDIDATES:
        for alpha in alphas:
            for rate in rates:
                summary = f"{loss}, alpha {alpha:g}, learning rate {rate:g}"
                yield Arm(name, summary, rate, alpha, loss=loss, **options)


if __name__ == "__main__":
    main()
