"""Give a demo's weights one width, or one each by `allocate_bits` under the same budget.

python -m benchmarks.accuracy.mixed_widths minilm --seeds 3 --out benchmarks/results/xeon-2-cores

On the test rows; activations of 8 bits, min-max, weights per channel, rounded to nearest or by
gptq. Weights that get no width, of embeddings and convolutions, have 8 bits in all rows. Nothing
was chosen here. A run that was interrupted goes on where it stopped.
"""

import copy
import json
from collections import Counter
from collections.abc import Iterator
from itertools import product
from typing import Any

from benchmarks import arguments
from benchmarks.accuracy.methods import ARMS
from quanttune.demo import recipe
from quanttune.environment import environment
from quanttune.files import write_json
from quanttune.quantization.bit_allocation import allocate_bits
from quanttune.quantization.simulation import quantize

BUDGETS = (3, 4, 5, 6)  # mean bits of a weight
CHOICES = tuple(range(2, 9))
COVERAGE = "linear"


def main() -> None:
    options = arguments.of_task(__doc__).parse_args()
    path, make = options.out / f"mixed-widths-{options.task}.json", recipe(options.task)
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"rows": []}
    results |= {"task": make.name, "metric": make.metric, "environment": environment()}
    done = {(row["seed"], row["arm"]) for row in results["rows"]}
    for seed in range(options.seeds):
        job = make(seed)
        for arm in (arm for arm in job.arms if arm.name in ARMS[job.name]):
            same = seed and not arm.learning_rate and job.name == "minilm"
            if same or (seed, arm.name) in done:
                continue  # an arm that is not tuned is the same for every seed
            results["rows"] += [
                {"seed": seed, "arm": arm.name} | row
                for row in _rows(job, job.prepare(arm, lambda: None))
            ]
            write_json(path, results)


def _rows(job: Any, model: Any) -> Iterator[dict[str, Any]]:
    data = job.calibration()
    yield {"budget": 32, "widths": "float", "methods": [], "value": job.evaluate(model)}
    for budget in BUDGETS:
        allocated = allocate_bits(model, budget, choices=CHOICES, data=data)
        ways = {"one": {site: {"bits": budget} for site in allocated}, "allocated": allocated}
        for (widths, overrides), methods in product(ways.items(), ([], ["gptq"])):
            quantized = quantize(
                copy.deepcopy(model),
                coverage=COVERAGE,
                overrides=overrides,
                methods=methods,
                data=data,
            )
            row = {"budget": budget, "widths": widths, "methods": methods}
            given = Counter(one["bits"] for one in overrides.values())
            row |= {"given": dict(sorted(given.items())), "value": job.evaluate(quantized)}
            print(row, flush=True)
            yield row


if __name__ == "__main__":
    main()
