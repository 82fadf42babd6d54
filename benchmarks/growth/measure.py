"""Measure a training step, calibration and simulation, and their memory, along four axes.

python -m benchmarks.growth.measure --out DIR --only memory   # on any machine, half an hour
python -m benchmarks.growth.measure --out DIR                 # times as well: alone, half an hour

The model is OPT's kind with random weights, which change no time. Each figure is of a fresh
process. A run that was interrupted goes on where it stopped.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any

from benchmarks import arguments
from benchmarks.growth.points import AXES, Point
from benchmarks.kernels.observed_step import ALPHA, MANY, backward, seconds_of, step_times
from benchmarks.kernels.peak_memory import peak_above, without_gaps
from benchmarks.provenance import commit
from quanttune import attach, quantize
from quanttune.environment import environment
from quanttune.files import write_json
from quanttune.quantization.running import forward_batches
from quanttune.tuning.sites import find_sites

COVERAGE = "linear"
SECONDS, LEAST = 5.0, 3  # of turns


def main() -> None:
    parser = arguments.of_folder(__doc__)
    parser.add_argument("--only", choices=("memory", "times"))
    options = parser.parse_args()
    path = options.out / "growth.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"points": {}}
    for axis, points in AXES.items():
        for point in points:
            for kind in (kind for kind in KINDS if kind.startswith(options.only or "")):
                known = results["points"].setdefault(_key(axis, point), point.as_json())
                if kind in known:
                    continue
                known[kind] = _in_a_process(kind, point)
                facts = {"commit": commit(), "environment": environment()}
                write_json(path, results | facts)
                print(axis, known, flush=True)


def _key(axis: str, point: Point) -> str:
    return f"{axis}: {getattr(point, axis) if axis != 'size' else point.width}"


def _in_a_process(kind: str, point: Point) -> Any:
    request = json.dumps([kind, point.as_json()])
    command = [sys.executable, "-m", __spec__.name.rpartition(".")[0], request]
    environ = without_gaps() if kind.startswith("memory") else None
    return json.loads(
        subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environ).stdout
    )


def point_times(point: Point) -> dict[str, float]:
    """Return what a step takes, and how large its model is."""
    model = point.model()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    facts = {"parameters": parameters, "sites": len(find_sites(model))}
    return facts | step_times(model, point.batch(), SECONDS)


def calibration_times(point: Point) -> dict[str, float]:
    """Return the median milliseconds of a forward, of calibrating on it, and of simulating it."""
    data, samples, until = [point.batch()], [], perf_counter() + SECONDS
    while len(samples) < LEAST or perf_counter() < until:
        model = point.model().eval()  # anew each time: no room for two of 1.3 billion parameters
        forward = partial(forward_batches, model, data)
        forward()
        quantized = partial(quantize, model, coverage=COVERAGE, data=data)
        samples.append([seconds_of(call) for call in (forward, quantized, forward)])
        del model, forward, quantized
    medians = (1e3 * median(taken) for taken in zip(*samples, strict=True))
    return dict(zip(("forward", "calibrated", "simulated"), medians, strict=True))


def step_memory(point: Point, is_observed: bool, is_first: bool = False) -> float:
    """Return the peak of a forward and backward above the loaded model, in MiB.

    The first observed step compares two gradients, once.
    """
    model, ids = point.model().train(), point.batch()
    if is_first:
        backward(model, ids[:1, :8], None)  # what is loaded at first use is not counted
    tuner = attach(model, ALPHA, total_steps=MANY, detach_deviation=True) if is_observed else None
    if not is_first:
        backward(model, ids[:1, :8], tuner)
    model.zero_grad(set_to_none=True)
    return peak_above(partial(backward, model, ids, tuner))


def calibration_memory(point: Point, is_calibrated: bool) -> float:
    """Return the peak of a forward, or of quantizing the model on it, above the loaded model."""
    model, data = point.model().eval(), [point.batch()]
    forward_batches(model, [data[0][:1, :8]])
    if is_calibrated:
        return peak_above(partial(quantize, model, coverage=COVERAGE, data=data))
    return peak_above(partial(forward_batches, model, data))


KINDS: dict[str, Callable[[Point], Any]] = {
    "memory, plain": partial(step_memory, is_observed=False),
    "memory, observed": partial(step_memory, is_observed=True),
    "memory, first observed": partial(step_memory, is_observed=True, is_first=True),
    "memory, forward": partial(calibration_memory, is_calibrated=False),
    "memory, calibrated": partial(calibration_memory, is_calibrated=True),
    "times, step": point_times,
    "times, calibration": calibration_times,
}


if __name__ == "__main__":
    main()
