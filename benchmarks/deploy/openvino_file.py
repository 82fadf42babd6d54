"""An ONNX file in OpenVINO on the CPU, and which of its products multiply integers there."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor

from quanttune.deploy.onnx_values import PRODUCTS

os.environ.setdefault("CI", "true")  # the package sends usage data else
ACCURATE = {"EXECUTION_MODE_HINT": "ACCURACY"}
_MULTIPLY = {"FullyConnected", "MatMul", "Convolution", "Subgraph"}


class OpenVinoFile:
    """Call a file as the model that it was made from.

    Args:
        accurate: compute in float32 what is not rounded, and round nothing else.
    """

    def __init__(self, path: Path, threads: int = 1, accurate: bool = True) -> None:
        import openvino

        options = {"INFERENCE_NUM_THREADS": str(threads), "PERFORMANCE_HINT": "LATENCY"}
        self._path = path
        self._compiled = openvino.Core().compile_model(
            path, "CPU", {**options, **(ACCURATE if accurate else {})}
        )
        self._request = self._compiled.create_infer_request()

    def __call__(self, **inputs: Tensor) -> Tensor:
        """Return the first output."""
        found = self._request.infer({name: x.numpy() for name, x in inputs.items()})
        return torch.from_numpy(found[self._compiled.output(0)])

    def products(self) -> dict[str, bool]:
        """Tell of each product of the file whether it multiplies integers; call the model before.

        Attention's two are one operator, whose type is that of what it takes: 8 bits mean that both
        multiply integers only if probabilities are rounded too.
        """
        nodes = onnx.load(self._path, load_external_data=False).graph.node
        kinds = dict(self._kinds())
        return {
            node.name: kinds.get(node.name, "lost").endswith(("i8", "u8"))
            for node in nodes
            if node.op_type in PRODUCTS
        }

    def _kinds(self) -> Iterator[tuple[str, str]]:
        """Yield the products, and the type that OpenVINO's kernel is named after."""
        for operator in self._compiled.get_runtime_model().get_ops():
            facts: Any = operator.get_rt_info()
            if facts["layerType"].astype(str) in _MULTIPLY:
                for name in facts["originalLayersNames"].astype(str).split(","):
                    yield name.split("/")[0], facts["primitiveType"].astype(str)
