"""Export a quantized model to a program that PyTorch's own compiler computes in integers."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..fake_quantizer import integer_range
from ..quantization.quantizer import ActivationQuantizer
from ..quantization.state import quantizers
from .integer_weights import MAX_INTEGER_BITS, dequantize
from .requirements import check_example, check_model
from .tracing import BATCH, traced

_ops, _aten = torch.ops.quantized_decomposed, torch.ops.aten


def export_torch(
    model: nn.Module, example_inputs: Any, *, dynamic: Mapping[int, str] = BATCH
) -> torch.export.ExportedProgram:
    """Export a quantized model to a program of PyTorch, which rounds where the model does.

    Roundings to 8 bits or fewer are pairs of quantized_decomposed.quantize_per_tensor and
    dequantize_per_tensor, weights int8 behind dequantize_per_channel: what PyTorch's compilers
    look for. `torch.compile` makes integer products of them on x86 processors where
    torch._inductor.config.freezing is set and torchao's X86InductorQuantizer was imported. Those
    of attention stay in float. Run as it is, the program simulates.

    The codes are those of x * (1 / scale), not of x / scale: up to two in a million differ, by 1.
    More than 8 bits stay an op of quanttune, so that whoever loads the program must import it.

    Meanwhile no other thread may call a module: see `export_onnx`.

    Args: as those of `export_onnx`.

    Raises:
        ValueError: the model is not quantized, being tuned, or not calibrated, or an argument does
            not fit.
    """
    import torch.ao.quantization.fx._decomposed  # registers the ops; takes time

    check_model(model)
    args, kwargs = check_example(example_inputs, dynamic, model)
    with _decomposed(model):
        program = traced(model, args, kwargs, dynamic)
    torch.fx.replace_pattern(program.graph_module, _stacked_product, _plain_product)
    return program.run_decompositions({dequantize: _dequantized})


@contextmanager
def _decomposed(model: nn.Module) -> Iterator[None]:
    """Let activations be rounded by the ops that compilers look for."""
    with ExitStack() as undo:
        for quantizer in quantizers(model).values():
            if quantizer.calibrated and quantizer.bits <= MAX_INTEGER_BITS:
                undo.callback(vars(quantizer).pop, "round", None)
                quantizer.round = _rounding(quantizer)  # type: ignore[method-assign, assignment]
        yield


def _rounding(quantizer: ActivationQuantizer) -> Callable[[Tensor], Tensor]:
    # numbers, not tensors, which the compiler does not take for a product's scale
    scale = quantizer.scale.item()
    grid = scale, quantizer.zero, *integer_range(quantizer.bits), torch.int8

    def rounded(x: Tensor) -> Tensor:
        codes = _ops.quantize_per_tensor.default(x, *grid)
        return _ops.dequantize_per_tensor.default(codes, *grid)  # type: ignore[no-any-return]

    return rounded


def _stacked_product(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply two matrices as `IntegerLinear` does for ONNX Runtime; compilers want them alone."""
    product = _aten.matmul.default(_aten.unsqueeze.default(x, 0), weight)
    return _aten.squeeze.dim(product, 0)  # type: ignore[no-any-return]


def _plain_product(x: Tensor, weight: Tensor) -> Tensor:
    return _aten.matmul.default(x, weight)  # type: ignore[no-any-return]


def _dequantized(codes: Tensor, scale: Tensor, axis: int | None) -> Tensor:
    """Dequantize a weight; a product's as (outputs, inputs), which the compiler looks for."""
    is_product = codes.dim() == 2
    if is_product:
        codes = codes.t().contiguous()
    outputs = codes.shape[0]
    zeros = torch.zeros(outputs, dtype=torch.int64, device=codes.device)
    weight: Tensor = _ops.dequantize_per_channel.default(
        codes, scale.expand(outputs), zeros, 0, *integer_range(MAX_INTEGER_BITS), torch.int8
    )
    return weight.t() if is_product else weight
