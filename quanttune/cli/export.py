"""`quanttune export`."""

from pathlib import Path
from typing import Annotated

import typer

from . import options
from .terminal import Json, say, writable, write_numbers


def run(
    model: Annotated[str, typer.Argument(help="A folder of quanttune calibrate.")],
    out: Annotated[Path, typer.Option(help="The file.", callback=writable)],
    task: options.Task = None,
    act_dtype: Annotated[
        str, typer.Option(help="Of the codes: uint8 for ONNX Runtime, int8 for TensorRT.")
    ] = "uint8",
    opset: Annotated[int, typer.Option(help="Version of the operators, 18 to 21.")] = 20,
    json: Json = None,
) -> None:
    """Write a quantized model to an ONNX file of integers.

    Example: quanttune export sst2-w8a8 --out sst2.onnx
    """
    settings = options.dataset(model, "", task)
    with options.of_extra("deploy"):
        from ..jobs.export import export

        outcome = export(settings, out, act_dtype=act_dtype, opset=opset)
    names = ", ".join(outcome["inputs"])
    say(f"{out}: {outcome['bytes'] / 1e6:.1f} MB, from {names}")
    write_numbers(json, outcome)
