"""Write a float model to an ONNX file: what an integer one is compared with."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .external_data import write
from .onnx_export import converted
from .parts import Part, traceable
from .requirements import check_example
from .tracing import BATCH, traced


def export_float(
    model: nn.Module,
    example_inputs: Any,
    path: Path,
    *,
    opset: int = 20,
    dynamic: Mapping[int, str] = BATCH,
    part: Part | None = None,
) -> None:
    """Write a float model to an ONNX file as torch.onnx makes it, in evaluation mode.

    The graph is left as it is, for it is the rival of what `export_onnx` writes; notes of where it
    was traced are dropped. The arguments are those of `export_onnx`.

    part: of an encoder-decoder, which is written alone; it tells what is dynamic.

    Raises:
        ValueError: the example does not fit.
    """
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    free = part.dimensions if part else dynamic
    with traceable(model, example_inputs, part) as (example, names):
        args, kwargs = check_example(example, free, model)
        # the others' results lie in memory otherwise than those of the products that a file has
        with sdpa_kernel(SDPBackend.MATH):
            program = traced(model, args, kwargs, free)
            exported = converted(program, opset, input_names=names)
    ClearMetadataAndDocStringPass()(exported.model)
    write(exported.model, path)
