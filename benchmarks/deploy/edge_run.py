"""Run exported programs in ExecuTorch and LiteRT beside their own float, and measure the answers.

make runtimes      # in an environment of its own, .venv-runtimes

The demos' tuned models, W8A8, all that the runtime takes rounded: a small ViT on digits, which is
taught here in a minute, and MiniLM, a BERT of six layers, in five. And a ViT-tiny of four blocks
and a BERT of two with random weights. A run that was interrupted goes on where it stopped.
"""

import copy
import json
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import quanttune as qt
from benchmarks import arguments
from benchmarks.deploy.edge_programs import ExecuTorch, LiteRT, Program
from benchmarks.deploy.tuned import tuned
from benchmarks.provenance import commit
from quanttune.demo.digits import Digits
from quanttune.demo.minilm import MiniLM
from quanttune.deploy.verification.simulated_codes import perturbed
from quanttune.environment import environment
from quanttune.files import write_json
from quanttune.quantization.running import main_output

TURNS = 200
COVERAGES = {"executorch": "full", "litert": "full_no_softmax"}
PACKAGES = ("executorch", "litert-torch", "ai-edge-litert")


class Case(NamedTuple):
    """A model, what calibrates it, and rows that calibration has not seen."""

    model: nn.Module
    calibration: list[Tensor]
    inputs: Tensor


def main() -> None:
    options = arguments.of_folder(__doc__).parse_args()
    file = options.out / "edge.json"
    result: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"rows": []}
    packages = {name: version(name) for name in PACKAGES}
    result["environment"] = {**environment(), **packages}
    done = {(row["model"], row["target"]) for row in result["rows"]}
    with TemporaryDirectory() as folder:
        for name, make in CASES.items():
            targets = [target for target in COVERAGES if (name, target) not in done]
            path = Path(folder) / name
            if targets:
                torch.save(make(), path)
            for target in targets:
                row = {"model": name, "target": target, "commit": commit()}
                result["rows"].append(row | compared(path, target))
                print(result["rows"][-1], flush=True)
                write_json(file, result)


def compared(path: Path, target: str) -> dict[str, Any]:
    """Measure a model as integers and in float, each in a process of its own.

    One process for all of them ended in a segmentation fault, for reasons that are not known.
    """
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as processes:
        kinds = ("integer", "float")
        rows = processes.map(measured, [path, path], [target, target], kinds)
        return dict(zip(kinds, rows, strict=True))


def digits() -> Case:
    job = Digits(0)
    model = tuned(job)
    return Case(model.eval(), job.calibration(), job.images["test"][:64])


def minilm() -> Case:
    job = MiniLM(0)
    model = tuned(job)
    calibration = [batch["input_ids"] for batch in job.calibration()]
    return Case(model.eval(), calibration, job.rows.test[:8])


def random_vit() -> Case:
    import timm

    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=4).eval()
    return Case(model, [torch.randn(8, 3, 64, 64)], torch.randn(2, 3, 64, 64))


def bert() -> Case:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = BertConfig(vocab_size=1000, intermediate_size=512, **sizes)
    ids = torch.randint(1000, (10, 24))
    return Case(BertForSequenceClassification(config).eval(), [ids[:8]], ids[8:])


CASES: dict[str, Callable[[], Case]] = {
    "ViT of digits, tuned": digits,
    "MiniLM, tuned": minilm,
    "ViT-tiny of four blocks, random weights": random_vit,
    "BERT of two layers, random weights": bert,
}


@torch.no_grad()
def measured(path: Path, target: str, kind: str) -> dict[str, Any]:
    """Measure one program beside what it is of: the simulation, or the model in float."""
    torch.set_num_threads(1)
    model, calibration, inputs = torch.load(path, weights_only=False)
    exact = main_output(model(inputs))
    coverage = COVERAGES[target]
    quantized = qt.quantize(copy.deepcopy(model), 8, coverage=coverage, data=calibration)
    simulated = main_output(quantized(inputs))
    with perturbed(quantized, seed=0):
        noise = main_output(quantized(inputs))
    is_integer = kind == "integer"
    program = (
        qt.export_torch(quantized, inputs, target=target)
        if is_integer
        else torch.export.export(model, (inputs,))
    )
    expected = simulated if is_integer else exact
    found = {"simulation_to_float": nearness(simulated, exact), "noise": nearness(noise, simulated)}
    for name, loaded in programs(target, program, is_integer, inputs).items():
        times = [loaded.seconds(inputs) for _ in range(TURNS)]
        found[name] = {
            "products": {
                "integer": loaded.integer, "float": loaded.float, "left": loaded.left,
            },
            **nearness(loaded(inputs), expected),
            "median_seconds": median(times),
            "fastest_seconds": min(times),
            "bytes": loaded.bytes,
        }  # fmt: skip
    return found


def programs(
    target: str, program: torch.export.ExportedProgram, is_integer: bool, inputs: Tensor
) -> dict[str, Program]:
    """Load a program in each way that its runtime has."""
    if target == "executorch":
        return {"XNNPACK": ExecuTorch(program)}
    return {
        "XNNPACK": LiteRT(program, is_integer, inputs),
        "own kernels": LiteRT(program, is_integer, inputs, own_kernels=True),
    }


def nearness(found: Tensor, expected: Tensor) -> dict[str, float]:
    """Compare answers: cosine of the least like and of the mean row, mean difference."""
    cosine = F.cosine_similarity(found, expected, dim=-1).flatten()
    return {
        "cosine": cosine.mean().item(),
        "lowest_cosine": cosine.min().item(),
        "error": (found - expected).abs().mean().item(),
    }


if __name__ == "__main__":
    main()
