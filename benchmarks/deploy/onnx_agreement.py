"""Export models of real sizes at three widths, and compare each file with its simulation.

python -m benchmarks.deploy.onnx_agreement --out benchmarks/results/xeon-2-cores

The demo's tuned MiniLM on its texts, and timm's models with random weights on random images.
Softmax is rounded too, so that every product is to be one of integers. A run that was interrupted
goes on where it stopped.
"""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

import quanttune as qt
from benchmarks import arguments
from benchmarks.deploy.tuned import tuned
from benchmarks.provenance import commit
from quanttune.demo.minilm import MiniLM
from quanttune.deploy.products import explain, has_vnni
from quanttune.environment import environment
from quanttune.files import write_json

WIDTHS = (8, 7, 6)
IMAGES = {
    "ViT-tiny": "vit_tiny_patch16_224",
    "DeiT-tiny, distilled": "deit_tiny_distilled_patch16_224",
    "Swin-tiny": "swin_tiny_patch4_window7_224",
}
Case = tuple[nn.Module, list[dict[str, Tensor]], dict[int, str]]


def main() -> None:
    folder = arguments.of_folder(__doc__).parse_args().out
    path = folder / "onnx-agreement.json"
    facts = {**environment(), "vnni": has_vnni()}
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"rows": []}
    results["environment"] = facts
    done = {(row["model"], row["bits"]) for row in results["rows"]}
    cases: dict[str, Callable[[], Case]] = {"tuned MiniLM": _minilm}
    cases |= {name: lambda model=model: _timm(model) for name, model in IMAGES.items()}  # type: ignore[misc]
    for name, make in cases.items():
        widths = [bits for bits in WIDTHS if (name, bits) not in done]
        case = make() if widths else None
        for bits in widths:
            row = {"model": name, "bits": bits, "commit": commit(), **_agreement(case, bits)}
            results["rows"].append(row)
            write_json(path, results)
            print(results["rows"][-1], flush=True)


def _minilm() -> Case:
    job = MiniLM(0)
    model = tuned(job)
    return model, job.calibration(), {0: "batch", 1: "tokens"}


def _timm(name: str) -> Case:
    import timm

    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    return model, [{"x": torch.randn(8, 3, 224, 224)} for _ in range(2)], {0: "batch"}


def _agreement(case: Any, bits: int) -> dict[str, Any]:
    model, data, dynamic = case
    quantized = qt.quantize(copy.deepcopy(model), bits, coverage="full", data=data)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        qt.export_onnx(quantized, data[0], path, dynamic=dynamic)
        products = explain(path).products
        found = qt.verify(path, quantized, data=data[:2])
    worst = max(found.layers, key=lambda layer: layer.differ)
    return {
        "integer_products": sum(product.is_integer for product in products),
        "float_products": {p.name: p.remark for p in products if not p.is_integer},
        "layers": len(found.layers),
        "layers_equal": sum(not layer.differ for layer in found.layers),
        "most_differing": {"layer": worst.name, "share": worst.differ},
        "most_beyond_one": max(layer.beyond_one for layer in found.layers),
        "problems": found.problems,
    }


if __name__ == "__main__":
    main()
