"""Export a quantized model to a program that PyTorch's own tools compute in integers."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from ..fake_quantizer import integer_range
from ..quantization.quantizer import ActivationQuantizer
from ..quantization.state import quantizers
from ..transaction import transaction
from .constant_weights import CONSTANTS, REROUNDED
from .edge_products import check_products
from .edge_tokens import keep_tokens
from .integer_weights import MAX_INTEGER_BITS
from .requirements import IN_PROGRAMS, check_example, check_model, check_target
from .tracing import BATCH, traced

_ops = torch.ops.quantized_decomposed


def export_torch(
    model: nn.Module,
    example_inputs: Any,
    *,
    target: str = "inductor",
    dynamic: Mapping[int, str] | None = None,
) -> torch.export.ExportedProgram:
    """Export a quantized model to a program of PyTorch, which rounds where the model does.

    Roundings to 8 bits or fewer are pairs of quantized_decomposed.quantize_per_tensor and
    dequantize_per_tensor, weights int8 constants behind dequantize_per_channel: what PyTorch's
    compilers look for. `torch.compile` makes integer products of them on x86 processors where
    torch._inductor.config.freezing is set and torchao's X86InductorQuantizer was imported. Those
    of attention stay in float. Run as it is, the program simulates.

    The codes are those of x * (1 / scale), not of x / scale: up to two in a million differ, by 1.
    More than 8 bits stay an op of quanttune, so that whoever loads the program must import it.

    Meanwhile no other thread may call a module: see `export_onnx`.

    Args:
        model, example_inputs: as those of `export_onnx`.
        target: who will run it: "inductor", "executorch" with XNNPACK, or "litert". The last two
            round to 8 bits, and multiply integers where the product is rounded too: by coverage
            "full_no_softmax", in ExecuTorch "full" as well.
        dynamic: as that of `export_onnx`; for the last two all sizes are those of the example.

    Raises:
        ValueError: the model is not quantized, being tuned, or not calibrated, or an argument does
            not fit, or the target would not multiply integers.
    """
    import_module("torch.ao.quantization.fx._decomposed")  # registers the ops; takes time
    check_model(model, IN_PROGRAMS)
    check_target(target, dynamic, quantizers(model))
    compiled = target == "inductor"
    sizes = (BATCH if compiled else {}) if dynamic is None else dynamic
    layout = REROUNDED if target == "litert" else CONSTANTS
    args, kwargs = check_example(example_inputs, sizes, model)
    with transaction(model), _decomposed(model):
        program = traced(model, args, kwargs, sizes, layout=layout)
    program = program.run_decompositions({})
    if target == "litert":
        keep_tokens(program)
    if not compiled:
        check_products(program, target)
    return program


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
