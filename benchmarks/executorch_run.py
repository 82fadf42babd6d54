"""Run exported programs in ExecuTorch beside its own float, and measure what they answer.

make runtimes      # in an environment of its own, .venv-executorch

A ViT-tiny of four blocks and a small BERT, both of random weights, W8A8, all rounded.
"""

import copy
import time
from collections.abc import Iterator
from importlib.metadata import version
from statistics import median
from typing import Any

import arguments
import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import to_edge_transform_and_lower
from executorch.runtime import Runtime
from provenance import commit
from torch import Tensor, nn
from torch.nn import functional as F

import quanttune as qt
from quanttune.environment import environment
from quanttune.files import write_json

TURNS = 30
PRODUCTS = ("aten.linear", "aten.convolution", "aten.addmm", "aten.mm", "aten.bmm")


class Lowered:
    """A program that was lowered to XNNPACK, and which of its products multiply integers."""

    def __init__(self, program: torch.export.ExportedProgram) -> None:
        edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
        left = edge.exported_program().graph_module
        self.left = list(_products(left))
        integer = [
            "dequantize_per_channel" in str(product.args[1])
            for name, module in left.named_children()
            if name.startswith("lowered_module")
            for product in _products(module.original_module.graph_module)
        ]
        self.integer, self.float = sum(integer), len(integer) - sum(integer)
        self._file = edge.to_executorch().buffer
        self._program = Runtime.get().load_program(self._file)
        self._method = self._program.load_method("forward")

    def __call__(self, *inputs: Tensor) -> Tensor:
        return self._method.execute(list(inputs))[0].clone()

    def seconds(self, *inputs: Tensor) -> float:
        start = time.perf_counter()
        self._method.execute(list(inputs))
        return time.perf_counter() - start

    @property
    def bytes(self) -> int:
        return len(self._file)


def main() -> None:
    options = arguments.of_folder(__doc__).parse_args()
    torch.manual_seed(0)
    result = {
        "environment": {**environment(), "executorch": version("executorch")},
        "commit": commit(),
        "vit": measured(*vit()),
        "bert": measured(*bert()),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(options.out / "executorch.json", result)


def vit() -> tuple[nn.Module, Tensor, Tensor]:
    import timm

    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=4).eval()
    return model, torch.randn(8, 3, 64, 64), torch.randn(2, 3, 64, 64)


def bert() -> tuple[nn.Module, Tensor, Tensor]:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = BertConfig(vocab_size=1000, intermediate_size=512, **sizes)
    model = BertForSequenceClassification(config).eval()
    return model, torch.randint(1000, (8, 24)), torch.randint(1000, (2, 24))


@torch.no_grad()
def measured(model: nn.Module, calibration: Tensor, inputs: Tensor) -> dict[str, Any]:
    """Measure a model as integers beside the same in float; the simulation is what both are of."""
    quantized = qt.quantize(copy.deepcopy(model), 8, coverage="full", data=[calibration])
    programs = {
        "integer": Lowered(qt.export_torch(quantized, inputs, target="executorch")),
        "float": Lowered(torch.export.export(model, (inputs,))),
    }
    simulated, exact = logits(quantized(inputs)), logits(model(inputs))
    found = programs["integer"](inputs)
    times: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(TURNS):
        for name, program in programs.items():
            times[name].append(program.seconds(inputs))
    return {
        "products": {
            name: {"integer": program.integer, "float": program.float, "left": len(program.left)}
            for name, program in programs.items()
        },
        "cosine": F.cosine_similarity(found, simulated).tolist(),
        "cosine_of_float": F.cosine_similarity(exact, simulated).tolist(),
        "error": (found - simulated).abs().mean().item(),
        "error_of_float": (exact - simulated).abs().mean().item(),
        "error_of_float_program": (programs["float"](inputs) - exact).abs().mean().item(),
        "seconds": {name: median(turns) for name, turns in times.items()},
        "fastest": {name: min(turns) for name, turns in times.items()},
        "bytes": {name: program.bytes for name, program in programs.items()},
    }


def logits(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits


def _products(module: torch.fx.GraphModule) -> Iterator[torch.fx.Node]:
    for node in module.graph.nodes:
        if node.op == "call_function" and any(name in str(node.target) for name in PRODUCTS):
            yield node


if __name__ == "__main__":
    main()
