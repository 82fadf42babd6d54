"""Run exported files in several runtimes: products of integers, answers, and (--times) speed.

python -m benchmarks.deploy.runtimes --out benchmarks/results/xeon-2-cores
python -m benchmarks.deploy.runtimes --out benchmarks/results/xeon-2-cores --times    # alone

Coverage full, so that every product is to be one of integers, and at 8 bits linear, with a file for
ONNX Runtime on CPUs and, if it is installed, NNCF's beside it; 8 images, 8 x 128 tokens. timm's
models and the OPT have random weights, the MiniLM is the demo's tuned one. Files stay in --files
for the second call. A run that was interrupted goes on where it stopped.
"""

import argparse
import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import quanttune as qt
from benchmarks import arguments
from benchmarks.deploy import nncf_file
from benchmarks.deploy.onnx_agreement import WIDTHS
from benchmarks.deploy.openvino_file import OpenVinoFile
from benchmarks.deploy.tuned import tuned
from benchmarks.deploy.web_file import answers
from benchmarks.provenance import commit
from quanttune.demo.minilm import MiniLM
from quanttune.deploy.float_export import export_float
from quanttune.deploy.latency import in_turns, summarize
from quanttune.deploy.onnx_model import OnnxModel, has_vnni
from quanttune.deploy.products import explain
from quanttune.deploy.tracing import outputs_by_name
from quanttune.deploy.verification.simulated_codes import perturbed
from quanttune.environment import environment
from quanttune.files import write_json

ROWS, TOKENS = 8, 128
SECONDS = 15.0  # of turns per model, runtime and number of threads
TYPES = ("uint8", "int8")
THREADS = (1, 2)
TIMED = {"onnxruntime": TYPES, "openvino": ("int8",)}  # uint8 is computed in float there
KINDS = [("full", bits, kind) for bits in WIDTHS for kind in TYPES] + [("linear", 8, "int8")]
COVERAGES = ("full", "linear")
CPU = "linear-8-cpu"  # the file of int8 for "onnxruntime-cpu": operators of ONNX Runtime's own
Batch = dict[str, Tensor]


def main() -> None:
    options = _options()
    options.files.mkdir(parents=True, exist_ok=True)
    path = options.out / "runtimes.json"
    results: dict[str, Any] = {"rows": [], "times": []}
    if path.exists():
        results = json.loads(path.read_text())
    results["environment"] = {**environment(), "vnni": has_vnni()}
    for name in options.models:
        key, cells = ("times", _timed(name)) if options.times else ("rows", _agreeing(name))
        for cell, measure in cells:
            is_there = any(cell.items() <= row.items() for row in results[key])
            if is_there or cell["coverage"] not in options.coverages:
                continue
            results[key].append({**cell, "commit": commit(), **measure(options)})
            write_json(path, results)
            print(results[key][-1], flush=True)


def _options() -> argparse.Namespace:
    parser = arguments.of_folder(__doc__)
    parser.add_argument("--files", type=Path, default=Path("build/runtimes"))
    parser.add_argument("--models", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--coverages", nargs="+", choices=COVERAGES, default=list(COVERAGES))
    parser.add_argument("--times", action="store_true", help="measure speed, and nothing else")
    parser.add_argument("--web", type=Path, help="where npm has installed onnxruntime-web")
    return parser.parse_args()


def images() -> tuple[list[Batch], Batch]:
    generator = torch.Generator().manual_seed(0)
    batches = [{"x": torch.randn(ROWS, 3, 224, 224, generator=generator)} for _ in range(3)]
    return batches[:2], batches[2]


def words() -> tuple[list[Batch], Batch]:
    generator = torch.Generator().manual_seed(0)
    sizes = (3, ROWS, TOKENS)
    batches = [{"input_ids": ids} for ids in torch.randint(3, 2048, sizes, generator=generator)]
    return batches[:2], batches[2]


def texts() -> tuple[list[Batch], Batch]:
    data = MiniLM(0).calibration()
    ids = torch.cat([rows["input_ids"].flatten() for rows in data])
    return data, {"input_ids": ids[: ROWS * TOKENS].reshape(ROWS, TOKENS)}


def timm_model(name: str) -> nn.Module:
    import timm

    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name).eval()
    return model


def opt() -> nn.Module:
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "word_embed_proj_dim": 256, "ffn_dim": 1024, "vocab_size": 2048}
    config = OPTConfig(**sizes, num_hidden_layers=4, num_attention_heads=4, use_cache=False)
    return OPTForCausalLM(config).eval()


@torch.enable_grad()
def minilm() -> nn.Module:
    job = MiniLM(0)
    return tuned(job)


IMAGE, TEXT = {0: "batch"}, {0: "batch", 1: "tokens"}
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], dict[int, str]]] = {
    "ViT-tiny": (partial(timm_model, "vit_tiny_patch16_224"), images, IMAGE),
    "Swin-tiny": (partial(timm_model, "swin_tiny_patch4_window7_224"), images, IMAGE),
    "tuned MiniLM": (minilm, texts, TEXT),
    "OPT, 4 layers": (opt, words, TEXT),
}


@cache
def _model(name: str) -> nn.Module:
    return CASES[name][0]()


@cache
def _data(name: str) -> tuple[list[Batch], Batch]:
    data: tuple[list[Batch], Batch] = CASES[name][1]()
    return data


@cache
def _quantized(name: str, coverage: str, bits: int) -> nn.Module:
    model, (data, _) = copy.deepcopy(_model(name)), _data(name)
    quantized: nn.Module = qt.quantize(model, bits, coverage=coverage, data=data)
    return quantized


@cache
def _simulated(name: str, coverage: str, bits: int) -> tuple[Tensor, dict[str, float]]:
    """Return the simulation's answers, and how near to them float and a little noise are."""
    exact, quantized, (_, batch) = _model(name), _quantized(name, coverage, bits), _data(name)
    simulated = _first(quantized(**batch))
    with perturbed(quantized, seed=0):
        noise = _cosine(_first(quantized(**batch)), simulated)
    return simulated, {"float": _cosine(_first(exact(**batch)), simulated), "noise": noise}


def _file(folder: Path, name: str, shapes: str, kind: str) -> Path:
    return folder / f"{name}-{shapes}-{kind}.onnx".lower().replace(" ", "-").replace(",", "")


def _shapes(name: str) -> dict[str, dict[int, str]]:
    return {"dynamic": CASES[name][2], "static": {}}


def _agreeing(name: str) -> Iterator[tuple[dict[str, Any], Callable[..., dict[str, Any]]]]:
    for coverage, bits, kind in KINDS:
        for shapes in ("dynamic", "static"):
            cell = {"model": name, "coverage": coverage, "bits": bits, "shapes": shapes}
            cell["act_dtype"] = kind
            yield cell, partial(_agreement, **cell)


@torch.no_grad()
def _agreement(
    options: argparse.Namespace, model: str, coverage: str, bits: int, shapes: str, act_dtype: str
) -> dict[str, Any]:
    """Export a model, and compare what each runtime makes of the file with the simulation."""
    quantized, dynamic = _quantized(model, coverage, bits), _shapes(model)[shapes]
    _, batch = _data(model)
    path = _file(options.files, model, shapes, f"{coverage}-{bits}-{act_dtype}")
    qt.export_onnx(quantized, batch, path, act_dtype=act_dtype, dynamic=dynamic)
    if coverage == "linear":
        path_of_cpu = _file(options.files, model, shapes, CPU)
        more = {"target": "onnxruntime-cpu", "act_dtype": act_dtype, "dynamic": dynamic}
        qt.export_onnx(quantized, batch, path_of_cpu, **more)
    reference = _file(options.files, model, shapes, "float")
    if not reference.exists():
        export_float(_model(model), batch, reference, dynamic=dynamic)
    simulated, controls = _simulated(model, coverage, bits)
    runtimes = {}
    products = [product.is_integer for product in explain(path).products]
    found = _first(OnnxModel(path)(**batch))
    runtimes["onnxruntime"] = {"integer": sum(products), "cosine": _cosine(found, simulated)}
    if coverage == "linear":
        answer = _first(OnnxModel(path_of_cpu)(**batch))
        runtimes["onnxruntime-cpu"] = {"cosine": _cosine(answer, simulated)}
    openvino = OpenVinoFile(path)
    cosine = _cosine(openvino(**batch), simulated)
    runtimes["openvino"] = {"integer": sum(openvino.products().values()), "cosine": cosine}
    if options.web:
        answer, version = answers(path, batch, options.web)
        cosines = {"cosine": _cosine(answer, simulated), "cosine_to_native": _cosine(answer, found)}
        runtimes["onnxruntime-web"] = {"version": version, **cosines}
    facts = {"products": len(products), "bytes": path.stat().st_size, **controls}
    return {**facts, "runtimes": runtimes}


def _first(outputs: Any) -> Tensor:
    found: Tensor = next(iter(outputs_by_name(outputs).values()))
    return found


def _cosine(found: Tensor, simulated: Tensor) -> float:
    """Return the mean cosine of images or tokens."""
    return F.cosine_similarity(found.double(), simulated.double(), dim=-1).mean().item()


def _timed(name: str) -> Iterator[tuple[dict[str, Any], Callable[..., dict[str, Any]]]]:
    for coverage, shapes, runtime, threads in product(
        COVERAGES, ("dynamic", "static"), TIMED, THREADS
    ):
        cell = {"model": name, "shapes": shapes, "runtime": runtime, "threads": threads}
        yield {**cell, "coverage": coverage}, partial(_speed, coverage=coverage, **cell)


def _speed(
    options: argparse.Namespace,
    coverage: str,
    model: str,
    shapes: str,
    runtime: str,
    threads: int,
) -> dict[str, Any]:
    """Time files in turns with the float file, which comes first."""
    data, batch = _data(model)
    kinds = [
        "-".join(map(str, kind))
        for kind in KINDS
        if kind[0] == coverage and kind[2] in TIMED[runtime]
    ]
    if coverage == "linear" and runtime == "onnxruntime":
        kinds.append(CPU)
    files = {kind: _file(options.files, model, shapes, kind) for kind in ("float", *kinds)}
    calls: dict[str, Callable[[], Any]]
    cosines = {}
    if runtime == "onnxruntime":
        sessions = {kind: OnnxModel(path, threads=threads) for kind, path in files.items()}
        calls = {kind: partial(session, **batch) for kind, session in sessions.items()}
    else:
        if (coverage, shapes) == (
            "linear",
            "dynamic",
        ) and nncf_file.is_installed():  # it calibrates by other sizes
            files["nncf"] = nncf_file.write(files["float"], data)
        compiled = {kind: OpenVinoFile(path, threads) for kind, path in files.items()}
        compiled["float, no hint"] = OpenVinoFile(files["float"], threads, accurate=False)
        exact = compiled["float"](**batch)
        cosines = {k: _cosine(file(**batch), exact) for k, file in compiled.items()}
        calls = {kind: partial(file, **batch) for kind, file in compiled.items()}
    timings = summarize(in_turns(calls, SECONDS))
    found = {"timings": {kind: asdict(timing) for kind, timing in timings.items()}}
    return {**found, "cosine_to_float": cosines} if cosines else found


if __name__ == "__main__":
    main()
