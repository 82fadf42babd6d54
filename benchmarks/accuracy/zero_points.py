"""Quantize a demo's arms with zero points for activations, which the demo itself leaves out.

python -m benchmarks.accuracy.zero_points minilm --seeds 3 --out benchmarks/results/xeon-2-cores

docs/results.md has it beside the demo's symmetric grids, which are of the same arms and seeds.
"""

import time
from collections.abc import Iterator
from typing import Any

from benchmarks import arguments
from quanttune.demo import recipe
from quanttune.demo.experiment import Results, Row, quantized_in
from quanttune.environment import environment
from quanttune.files import write_json
from quanttune.quantization.calibrators import AFFINE

ARMS = ("base", "control", "detached")


def main() -> None:
    options = arguments.of_task(__doc__).parse_args()
    make, began = recipe(options.task), time.monotonic()
    arms = [arm for arm in make.arms if arm.name in ARMS and not arm.same_as]
    results = Results(
        options.task,
        make.metric,
        ["Activations have zero points, weights have none."],
        {"steps": make.steps, "arms": [vars(arm) for arm in arms]},
        environment(),
    )
    for seed in range(options.seeds):
        job = make(seed)
        for arm in arms:
            results.rows += _rows(job, seed, arm)
    results.seconds = round(time.monotonic() - began, 1)
    write_json(options.out / f"zero-points-{options.task}.json", results.as_dict())


def _rows(job: Any, seed: int, arm: Any) -> Iterator[Row]:
    model = job.prepare(arm, lambda: None)
    ways = [(calibrator, "channel") for calibrator in AFFINE]
    for calibrator, weights, bits, quantized in quantized_in(job, ways, model, symmetric=False):
        value = job.evaluate(quantized)
        row = Row(seed, arm.name, bits, calibrator, weights, job.metric, value)
        print(row, flush=True)
        yield row


if __name__ == "__main__":
    main()
