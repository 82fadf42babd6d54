"""An exported program, in ExecuTorch or LiteRT: what it answers, and which products are integers.

Their packages stand in an environment of its own (`make runtimes`).
"""

import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

import torch
from torch import Tensor


class Program(Protocol):
    """A program that a runtime has loaded."""

    integer: int  # products of integers
    float: int  # products of floats inside the runtime's fast part
    left: int  # products outside of it
    bytes: int

    def __call__(self, inputs: Tensor) -> Tensor:
        """Return the first output, as floats."""

    def seconds(self, inputs: Tensor) -> float:
        """Measure one call."""


class ExecuTorch:
    """A program lowered to XNNPACK, as docs/deployment.md says."""

    _PRODUCTS = ("aten.linear", "aten.convolution", "aten.addmm", "aten.mm", "aten.bmm")

    def __init__(self, program: torch.export.ExportedProgram) -> None:
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower
        from executorch.runtime import Runtime

        edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
        outside = edge.exported_program().graph_module
        self.left = len(list(self._products(outside)))
        integer = [
            "dequantize_per_channel" in str(product.args[1])
            for name, module in outside.named_children()
            if name.startswith("lowered_module")
            for product in self._products(module.original_module.graph_module)
        ]
        self.integer, self.float = sum(integer), len(integer) - sum(integer)
        file = edge.to_executorch().buffer
        self.bytes = len(file)
        self._program = Runtime.get().load_program(file)
        self._method = self._program.load_method("forward")

    def __call__(self, inputs: Tensor) -> Tensor:
        return self._method.execute([inputs])[0].clone()

    def seconds(self, inputs: Tensor) -> float:
        start = time.perf_counter()
        self._method.execute([inputs])
        return time.perf_counter() - start

    def _products(self, module: torch.fx.GraphModule) -> Iterator[torch.fx.Node]:
        for node in module.graph.nodes:
            name = str(node.target)
            if node.op == "call_function" and any(kind in name for kind in self._PRODUCTS):
                yield node


class LiteRT:
    """A program converted as docs/deployment.md says; by XNNPACK, or by LiteRT's own kernels."""

    _PRODUCTS = ("FULLY_CONNECTED", "CONV_2D", "BATCH_MATMUL")
    left = 0

    def __init__(
        self,
        program: torch.export.ExportedProgram,
        is_integer: bool,
        example: Tensor,
        own_kernels: bool = False,
    ) -> None:
        import litert_torch
        from ai_edge_litert.interpreter import Interpreter, OpResolverType
        from litert_torch.quantize import pt2e_quantizer
        from litert_torch.quantize.quant_config import QuantConfig

        config = pt2e_quantizer.get_symmetric_quantization_config(is_per_channel=True)
        roundings = pt2e_quantizer.PT2EQuantizer().set_global(config)
        how = QuantConfig(pt2e_quantizer=roundings) if is_integer else None
        converted = litert_torch.convert(program.module(), (example,), quant_config=how)
        with TemporaryDirectory() as folder:
            path = Path(folder) / "model.tflite"
            converted.export(str(path))
            file = path.read_bytes()
        self.bytes = len(file)
        # what a delegate takes over is not listed: the products are counted without one
        plain = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
        kernels = plain if own_kernels else OpResolverType.AUTO
        types = list(
            self._types(Interpreter(model_content=file, experimental_op_resolver_type=plain))
        )
        self.integer = types.count(["int8", "int8"])
        self.float = len(types) - self.integer
        self._interpreter = Interpreter(
            model_content=file, num_threads=1, experimental_op_resolver_type=kernels
        )
        self._interpreter.allocate_tensors()

    def __call__(self, inputs: Tensor) -> Tensor:
        self._give(inputs)
        self._interpreter.invoke()
        (result, *_) = self._interpreter.get_output_details()
        found = torch.from_numpy(self._interpreter.get_tensor(result["index"])).float()
        scale, zero = result["quantization"]
        return (found - zero) * scale if scale else found

    def seconds(self, inputs: Tensor) -> float:
        self._give(inputs)
        start = time.perf_counter()
        self._interpreter.invoke()
        return time.perf_counter() - start

    def _give(self, inputs: Tensor) -> None:
        (source,) = self._interpreter.get_input_details()
        scale, zero = source["quantization"]
        given = (inputs / scale).round().clamp(-128, 127) + zero if scale else inputs
        self._interpreter.set_tensor(source["index"], given.numpy().astype(source["dtype"]))

    def _types(self, interpreter) -> Iterator[list[str]]:
        names = {
            tensor["index"]: tensor["dtype"].__name__ for tensor in interpreter.get_tensor_details()
        }
        for operator in interpreter._get_ops_details():
            if operator["op_name"] in self._PRODUCTS:
                yield [names[index] for index in operator["inputs"][:2]]
