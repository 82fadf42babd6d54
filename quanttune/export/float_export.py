"""Write a float model to an ONNX file: what an integer one is compared with."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .onnx_export import BATCH, output_names, traced, write
from .requirements import check_example


def export_float(
    model: nn.Module,
    example_inputs: Any,
    path: Path,
    *,
    opset: int = 20,
    dynamic: Mapping[int, str] = BATCH,
) -> None:
    """Write a float model to an ONNX file as torch.onnx makes it, in evaluation mode.

    The graph is left as it is, for it is the rival of what `export_onnx` writes; notes of where it
    was traced are dropped. The arguments are those of `export_onnx`.

    Raises:
        ValueError: the example does not fit.
    """
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    args, kwargs = check_example(example_inputs, dynamic)
    program = traced(model, args, kwargs, dynamic)
    exported: Any = torch.onnx.export(
        program, opset_version=opset, output_names=output_names(program), verbose=False
    )
    ClearMetadataAndDocStringPass()(exported.model)
    write(exported.model, path)
