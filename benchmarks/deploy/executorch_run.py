"""Run exported programs in ExecuTorch beside its own float, and measure what they answer.

make runtimes      # in an environment of its own, .venv-runtimes

A ViT-tiny of four blocks and a small BERT, both of random weights, W8A8, all rounded.
"""

import copy
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from statistics import median
from typing import Any

import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import to_edge_transform_and_lower
from executorch.runtime import Runtime
from torch import Tensor, nn
from torch.nn import functional as F

import quanttune as qt
from benchmarks import arguments
from benchmarks.provenance import commit
from quanttune.deploy.verification.simulated_codes import perturbed
from quanttune.environment import environment
from quanttune.files import write_json

TURNS = 200
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
    result = {
        "environment": {**environment(), "executorch": version("executorch")},
        "commit": commit(),
        **{name: compared(name) for name in MODELS},
    }
    write_json(options.out / "executorch.json", result)


def compared(name: str) -> dict[str, Any]:
    """Measure a model as integers and in float, each in a process of its own.

    One process for all of them ended in a segmentation fault, for reasons that are not known.
    """
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as processes:
        kinds = ("integer", "float")
        return dict(zip(kinds, processes.map(measured, [name, name], kinds), strict=True))


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


MODELS = {"vit": vit, "bert": bert}


@torch.no_grad()
def measured(name: str, kind: str) -> dict[str, Any]:
    """Measure one program beside what it is of: the simulation, or the model in float."""
    torch.manual_seed(0)
    model, calibration, inputs = MODELS[name]()
    exact = logits(model(inputs))
    quantized = qt.quantize(copy.deepcopy(model), 8, coverage="full", data=[calibration])
    simulated = logits(quantized(inputs))
    with perturbed(quantized, seed=0):
        noise = logits(quantized(inputs))
    is_integer = kind == "integer"
    program = Lowered(
        qt.export_torch(quantized, inputs, target="executorch")
        if is_integer
        else torch.export.export(model, (inputs,))
    )
    found, expected = program(inputs), simulated if is_integer else exact
    times = [program.seconds(inputs) for _ in range(TURNS)]
    return {
        "products": {
            "integer": program.integer, "float": program.float, "left": len(program.left),
        },
        "cosine": F.cosine_similarity(found, expected).tolist(),
        "error": (found - expected).abs().mean().item(),
        "cosine_of_noise": F.cosine_similarity(noise, simulated).tolist(),
        "cosine_of_float_to_simulation": F.cosine_similarity(exact, simulated).tolist(),
        "error_of_float_to_simulation": (exact - simulated).abs().mean().item(),
        "median_seconds": median(times),
        "fastest_seconds": min(times),
        "bytes": program.bytes,
    }  # fmt: skip


def logits(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits


def _products(module: torch.fx.GraphModule) -> Iterator[torch.fx.Node]:
    for node in module.graph.nodes:
        if node.op == "call_function" and any(name in str(node.target) for name in PRODUCTS):
            yield node


if __name__ == "__main__":
    main()
