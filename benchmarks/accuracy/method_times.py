"""Time every method on a ViT-tiny and on MiniLM, a refit of MiniLM, and its analysis.

python -m benchmarks.accuracy.method_times --out benchmarks/results/xeon-2-cores

Each is timed once, calibration included, and its outputs are compared with the float model's.
Searches of scales take minutes each, and adaround on MiniLM: they are left out. Goes on where it
was interrupted.
"""

import copy
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import quanttune as qt
from benchmarks import arguments
from benchmarks.provenance import commit
from quanttune.demo import recipe
from quanttune.environment import environment
from quanttune.files import write_json
from quanttune.quantization.methods import ERQ, METHODS
from quanttune.quantization.running import forward_batch, main_output

IMAGES, BATCH = 32, 16
BITS = {"vit": 4, "minilm": 6}
WAYS: dict[str, list[Any]] = {
    "no method": [],
    **{name: [name] for name in METHODS},
    "erq (greedy)": [ERQ(flip="greedy")],
    "repq + erq": ["repq", "erq"],
}
SEARCHES = ("noisyquant", "base_ptq", "ptq4vit", "apq_vit", "ranking")
LEFT_OUT = {"vit": SEARCHES, "minilm": (*SEARCHES, "adaround")}


def main() -> None:
    path = arguments.of_folder(__doc__).parse_args().out / "method-times.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"rows": []}
    known = [(row["model"], row["way"]) for row in results["rows"]]
    for name, make in MODELS.items():
        model, data = make()
        for way, methods in WAYS.items():
            if (name, way) not in known and way not in LEFT_OUT[name]:
                row = _row(name, model, data, methods)
                results["rows"].append({"model": name, "way": way, **row})
                _keep(path, results)
    for what, call in {"refit": _refit, "analyze": _analyze}.items():
        if what not in results:
            results[what] = _seconds(call)
            _keep(path, results)


def _keep(path: Any, results: dict[str, Any]) -> None:
    write_json(path, results | {"commit": commit(), "environment": environment()})
    print(results["rows"][-1], flush=True)


def _vit() -> tuple[Any, list[Any]]:
    import timm

    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224").eval()
    return model, list(torch.randn(IMAGES, 3, 224, 224).split(BATCH))


def _minilm() -> tuple[Any, list[Any]]:
    job: Any = recipe("minilm")(0, test_rows=16)
    return job.prepare(job.arms[0], lambda: None).eval(), job.calibration()


MODELS = {"vit": _vit, "minilm": _minilm}


@torch.no_grad()
def _row(name: str, model: Any, data: list[Any], methods: list[Any]) -> dict[str, Any]:
    options = {"coverage": "linear", "methods": methods, "data": data}
    quantized = copy.deepcopy(model)
    try:
        seconds = _seconds(partial(qt.quantize, quantized, BITS[name], **options))
    except ValueError as refused:
        return {"seconds": None, "error": None, "refused": str(refused)}
    pairs = [[main_output(forward_batch(one, x)) for one in (quantized, model)] for x in data]
    lost = sum((found - exact).square().sum() for found, exact in pairs)
    whole = sum(exact.square().sum() for _, exact in pairs)
    return {"seconds": seconds, "error": (lost / whole).item()}


def _refit() -> None:
    job: Any = recipe("minilm")(0, test_rows=16)
    job.prepare(next(arm for arm in job.arms if arm.name == "refit"), lambda: None)


def _analyze() -> None:
    command = [Path(sys.executable).with_name("quanttune"), "analyze", "minilm", "--out"]
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([*command, f"{folder}/analysis"], check=True, stdout=subprocess.DEVNULL)


def _seconds(call: Callable[[], Any]) -> float:
    began = time.monotonic()
    call()
    return round(time.monotonic() - began, 1)


if __name__ == "__main__":
    main()
