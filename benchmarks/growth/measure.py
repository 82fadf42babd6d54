"""Measure a training step, calibration and simulation, and their memory, along four axes.

python -m benchmarks.growth.measure --out DIR --only memory   # on any machine, half an hour
python -m benchmarks.growth.measure --out DIR                 # times as well: alone, half an hour

The model is OPT's kind with random weights, which change no time; the optimizer is SGD, since that
of Adam needs twice the parameters' memory, and neither is ours. Each figure is of a fresh process.
A run that was interrupted goes on where it stopped.
"""

import copy
import json
import math
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import arguments
from benchmarks.growth.points import AXES, Point
from benchmarks.kernels.peak_memory import CURRENT, peak_of, resident
from benchmarks.provenance import commit
from quanttune import attach, quantize
from quanttune.environment import environment
from quanttune.files import write_json
from quanttune.quantization.running import forward_batches
from quanttune.tuning.sites import find_sites

ALPHA, MANY = 0.01, 10**9  # small: random weights have no task that would outweigh more
COVERAGE = "linear"
LEAST, SECONDS = 5, 8.0  # rounds of each kind of time, and until they take so long


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
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def step_times(point: Point) -> dict[str, float]:
    """Return the median milliseconds of a step without and with the outlier loss, in turns."""
    model = point.model().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)  # the same work at each step
    ids = point.batch()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    found: dict[str, Any] = {"parameters": parameters, "sites": len(find_sites(model))}

    def plain() -> float:
        return _seconds(partial(_step, model, ids, optimizer, None))

    def observed() -> float:
        tuner = attach(model, ALPHA, total_steps=MANY, detach_deviation=True)
        _step(model, ids, optimizer, tuner)  # the first one plans what later ones do
        seconds = _seconds(partial(_step, model, ids, optimizer, tuner))
        _check(tuner.outlier_loss)
        tuner.detach()
        return seconds

    return found | _in_turns({"plain": plain, "observed": observed})


def calibration_times(point: Point) -> dict[str, float]:
    """Return the median milliseconds of a forward, of calibrating on it, and of simulating it."""
    model, data = point.model().eval(), [point.batch()]

    def calibrated() -> float:
        copied = copy.deepcopy(model)
        seconds = _seconds(partial(quantize, copied, coverage=COVERAGE, data=data))
        simulated.append(_seconds(partial(forward_batches, copied, data)))
        return seconds

    simulated: list[float] = []
    forward = partial(_seconds, partial(forward_batches, model, data))
    times = _in_turns({"forward": forward, "calibrated": calibrated})
    return times | {"simulated": 1e3 * median(simulated)}


def step_memory(point: Point, is_observed: bool, is_first: bool = False) -> float:
    """Return the peak of a forward and backward above the loaded model, in MiB.

    The first observed step compares two gradients, once.
    """
    model, ids = point.model().train(), point.batch()
    if is_first:
        _backward(model, ids[:1, :8], None)  # what is loaded at first use is not counted
    tuner = attach(model, ALPHA, total_steps=MANY, detach_deviation=True) if is_observed else None
    if not is_first:
        _backward(model, ids[:1, :8], tuner)
    model.zero_grad(set_to_none=True)
    return _above(partial(_backward, model, ids, tuner))


def calibration_memory(point: Point, is_calibrated: bool) -> float:
    """Return the peak of a forward, or of quantizing the model on it, above the loaded model."""
    model, data = point.model().eval(), [point.batch()]
    forward_batches(model, [data[0][:1, :8]])
    if is_calibrated:
        return _above(partial(quantize, model, coverage=COVERAGE, data=data))
    return _above(partial(forward_batches, model, data))


KINDS: dict[str, Callable[[Point], Any]] = {
    "memory, plain": partial(step_memory, is_observed=False),
    "memory, observed": partial(step_memory, is_observed=True),
    "memory, first observed": partial(step_memory, is_observed=True, is_first=True),
    "memory, forward": partial(calibration_memory, is_calibrated=False),
    "memory, calibrated": partial(calibration_memory, is_calibrated=True),
    "times, step": step_times,
    "times, calibration": calibration_times,
}


def _above(call: Callable[[], object]) -> float:
    before = resident(CURRENT)
    return peak_of(call) - before


def _step(model: nn.Module, ids: Tensor, optimizer: Any, tuner: Any) -> None:
    _backward(model, ids, tuner)
    optimizer.step()
    optimizer.zero_grad()
    if tuner:
        tuner.step()


def _backward(model: nn.Module, ids: Tensor, tuner: Any) -> None:
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    (tuner.combine(loss) if tuner else loss).backward()


def _check(outlier_loss: Tensor) -> None:
    """Check that what was timed had a loss: of normal activations about 3 to 5 deviations."""
    if not 1 < outlier_loss.item() < math.inf:
        raise RuntimeError(f"the outlier loss of random weights was {outlier_loss.item()}")


def _in_turns(calls: dict[str, Callable[[], float]]) -> dict[str, float]:
    """Return the median milliseconds of calls that return their seconds and take turns."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    until = perf_counter() + SECONDS
    while len(samples[next(iter(calls))]) < LEAST or perf_counter() < until:
        for name, call in calls.items():
            samples[name].append(call())
    return {name: 1e3 * median(times) for name, times in samples.items()}


def _seconds(call: Callable[[], object]) -> float:
    start = perf_counter()
    call()
    return perf_counter() - start


if __name__ == "__main__":
    main()
