"""Time models of integers in ONNX Runtime beside float, and measure what they answer.

python -m benchmarks.deploy.onnx_latency --minilm --out benchmarks/results/xeon-2-cores

A ViT-tiny of random weights, W8A8 in three coverages; with --minilm also the demo's tuned MiniLM.
Answers are checked before anything is timed. All files take turns. They are for "onnxruntime-cpu",
of the type that docs/deployment.md has for the processor: int8 with VNNI, else uint8.
"""

import argparse
import copy
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import quanttune as qt
from benchmarks import arguments
from benchmarks.bars import ONNX_BARS
from benchmarks.deploy.tuned import tuned
from benchmarks.provenance import commit
from quanttune.demo.minilm import MiniLM
from quanttune.deploy.float_export import export_float
from quanttune.deploy.latency import compare
from quanttune.deploy.onnx_model import OnnxModel
from quanttune.deploy.products import explain, has_vnni
from quanttune.deploy.verification.answers import check_answers
from quanttune.deploy.verification.simulated_codes import perturbed
from quanttune.environment import environment
from quanttune.files import write_json

THREADS = (1, 2)
SECONDS = 60.0  # of turns per model and number of threads
ROWS, TOKENS = 8, 128
COVERAGES = ("full_no_softmax", "full", "linear")
TEXT = {0: "batch", 1: "tokens"}
COSINE = 0.01  # how far ONNX Runtime's may be from the simulation's
Facts = dict[str, Any]


def main() -> None:
    options = _options()
    result: Facts = {
        "environment": {**environment(), "vnni": has_vnni()},
        "act_dtype": _act_dtype(),
        "commit": commit(),
        "vit": vit(options.small),
        "minilm": minilm(options.small) if options.minilm else None,
    }
    result["missed"] = list(missed(result))
    write_json(options.out / "onnx.json", result)
    for line in result["missed"]:
        print(f"missed: {line}")
    sys.exit(1 if result["missed"] and options.strict else 0)


def _options() -> argparse.Namespace:
    parser = arguments.of_folder(__doc__)
    parser.add_argument("--minilm", action="store_true", help="tune and measure it as well")
    parser.add_argument("--small", action="store_true", help="try the script, and time nothing")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if a bar is missed")
    return parser.parse_args()


def vit(small: bool = False) -> Facts:
    """Measure a ViT-tiny of random weights on random images."""
    import timm

    depth, image = (1, 32) if small else (12, 224)
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", depth=depth, img_size=image).eval()
    batch = {"x": torch.randn(ROWS, 3, image, image)}
    quantized = {name: _quantized(model, name, [batch]) for name in COVERAGES}
    with TemporaryDirectory() as folder:
        files = _files(model, quantized, batch, Path(folder), {0: "batch"})
        return _measured(files, batch, 0 if small else SECONDS)


def minilm(small: bool = False) -> Facts:
    """Measure the demo's MiniLM, tuned with its deviation held constant, on the demo's texts."""
    job = MiniLM(0)
    job.steps = 1 if small else job.steps
    model = tuned(job)
    data = job.calibration()
    words = torch.cat([rows["input_ids"].flatten() for rows in data])
    batch = {"input_ids": words[: ROWS * TOKENS].reshape(ROWS, TOKENS)}
    quantized = {name: _quantized(model, name, data) for name in COVERAGES[:2]}
    with TemporaryDirectory() as folder:
        files = _files(model, quantized, batch, Path(folder), TEXT)
        cosines = {}
        for name, simulation in quantized.items():
            _say(f"cosines, {name}")
            cosines[name] = {
                "simulation": job.evaluate(simulation),
                "onnxruntime": job.evaluate(_Encoder(files[name])),
            }
            with perturbed(simulation, seed=0):
                cosines[name]["noise"] = job.evaluate(simulation)
        return {
            "float_cosine": job.evaluate(model),
            "cosine": cosines,
            **_measured(files, batch, 0 if small else SECONDS),
        }


def missed(result: Facts) -> Iterator[str]:
    """Yield a line for each bar that a result does not reach."""
    for key, values in figures(result).items():
        bar = ONNX_BARS.get(key)
        for name, value in values.items():
            if bar and not bar.met(value):
                yield f"{key} {name}: {value:.2f}x, bar {bar.text()}"
    for name, cosine in (result["minilm"] or {"cosine": {}})["cosine"].items():
        distance = abs(cosine["onnxruntime"] - cosine["simulation"])
        if distance > COSINE:
            yield f"minilm cosine, {name}: {distance:.3f} from the simulation's, bar {COSINE}"


def figures(result: Facts) -> dict[str, dict[str, float]]:
    """Return what the table shows, by coverage."""
    found = {}
    for model in ("vit", "minilm"):
        if measured := result[model]:
            for threads, files in measured["latency"].items():
                found[f"{model}_speed_{threads}"] = _beside(files, lambda f: f["speed"])
            size = measured["bytes"]["float"]
            found[f"{model}_bytes"] = _beside(measured["bytes"], lambda b, size=size: b / size)
    return found


def _beside(files: dict[str, Any], figure: Callable[[Any], float]) -> dict[str, float]:
    return {name: figure(facts) for name, facts in files.items() if name != "float"}


def _act_dtype() -> str:
    return "int8" if has_vnni() else "uint8"


def _quantized(model: nn.Module, coverage: str, data: list[dict[str, Tensor]]) -> Any:
    _say(f"calibrating, {coverage}")
    return qt.quantize(copy.deepcopy(model), 8, coverage=coverage, data=data)


def _files(
    model: nn.Module,
    quantized: dict[str, nn.Module],
    batch: dict[str, Tensor],
    folder: Path,
    dynamic: dict[int, str],
) -> dict[str, Path]:
    """Export all, the float model first, and check what the files answer."""
    files = {name: folder / f"{name}.onnx" for name in ("float", *quantized)}
    _say("exporting")
    export_float(model, batch, files["float"], dynamic=dynamic)
    for name, simulation in quantized.items():
        how = {"target": "onnxruntime-cpu", "act_dtype": _act_dtype(), "dynamic": dynamic}
        qt.export_onnx(simulation, batch, files[name], **how)
        check_answers(files["float"], files[name], model, simulation, batch)
    return files


def _measured(files: dict[str, Path], batch: dict[str, Tensor], seconds: float) -> Facts:
    latency = {}
    for threads in THREADS:
        _say(f"timing, {threads} thread(s)")
        timings = compare(files, batch, threads, seconds)
        latency[str(threads)] = {name: asdict(timing) for name, timing in timings.items()}
    return {
        "inputs": {name: list(x.shape) for name, x in batch.items()},
        "products": {name: _products(path) for name, path in files.items()},
        "bytes": {name: path.stat().st_size for name, path in files.items()},
        "latency": latency,
    }


def _products(path: Path) -> dict[str, int]:
    integer = [product.is_integer for product in explain(path).products]
    return {"integer": sum(integer), "float": len(integer) - sum(integer)}


class _Encoder(nn.Module):
    """A file, called as the encoder that it was made from."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._run = OnnxModel(path)

    def forward(self, **inputs: Tensor) -> SimpleNamespace:
        return SimpleNamespace(**self._run(**inputs))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
