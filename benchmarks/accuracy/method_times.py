"""Time methods on a ViT-tiny: 12 layers, 192 wide, 32 random images, 4 bits.

python -m benchmarks.accuracy.method_times --out benchmarks/results/xeon-2-cores

Each is timed once, calibration included, after its outputs were found to be nearer to the float
model's than those of rounding to nearest.
"""

import copy
import time
from typing import Any

import torch

import quanttune as qt
from benchmarks import arguments
from benchmarks.provenance import commit
from quanttune.environment import environment
from quanttune.files import write_json
from quanttune.quantization.methods import ERQ

IMAGES, BATCH = 32, 16
WAYS: dict[str, list[Any]] = {
    "no method": [],
    "smoothquant": ["smoothquant"],
    "outlier_suppression": ["outlier_suppression"],
    "bias_correction": ["bias_correction"],
    "awq + weight_clipping": ["awq", "weight_clipping"],
    "adaround": ["adaround"],
    "gptq": ["gptq"],
    "oac": ["oac"],
    "erq": ["erq"],
    "erq (greedy)": [ERQ(flip="greedy")],
    "qera": ["qera"],
    "repq + erq": ["repq", "erq"],
}


def main() -> None:
    import timm

    folder = arguments.of_folder(__doc__).parse_args().out
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224").eval()
    data = torch.randn(IMAGES, 3, 224, 224).split(BATCH)
    rows = [{"way": way, **_row(model, data, methods)} for way, methods in WAYS.items()]
    for row in rows:
        print(row)
        if not row["error"] <= rows[0]["error"]:
            raise SystemExit(f"{row['way']} is further from the float model than no method")
    results = {"commit": commit(), "environment": environment(), "rows": rows}
    write_json(folder / "method-times.json", results)


@torch.no_grad()
def _row(model: Any, data: Any, methods: list[Any]) -> dict[str, float]:
    began = time.monotonic()
    options = {"coverage": "linear", "methods": methods, "data": data}
    quantized = qt.quantize(copy.deepcopy(model), 4, **options)
    seconds = round(time.monotonic() - began, 1)
    pairs = [(quantized(x), model(x)) for x in data]
    lost = sum((found - exact).square().sum() for found, exact in pairs)
    whole = sum(exact.square().sum() for _, exact in pairs)
    return {"seconds": seconds, "error": (lost / whole).item()}


if __name__ == "__main__":
    main()
