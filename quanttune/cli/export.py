"""`quanttune export`."""

from pathlib import Path
from typing import Annotated

import typer

from . import options
from .terminal import Json, say, writable, write_numbers

ONNX, *FOLDERS = FORMATS = ("onnx", "compressed-tensors", "torchao")


def run(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="A folder of quanttune calibrate.")],
    out: Annotated[Path, typer.Option(help="The file, or folder.", callback=writable)],
    format: Annotated[
        str, typer.Option(help=f"{ONNX}, or for transformers {' or '.join(FOLDERS)}.")
    ] = ONNX,
    task: options.Task = None,
    target: Annotated[
        str,
        typer.Option(
            help="The runtime: onnxruntime[-cpu,-web], opencv, openvino, tensorrt, tract."
        ),
    ] = "onnxruntime",
    act_dtype: Annotated[
        str | None,
        typer.Option(help="Of the codes: onnxruntime's uint8 for any x86, or int8 for VNNI."),
    ] = None,
    opset: Annotated[int, typer.Option(help="Version of the operators, 18 to 21.")] = 20,
    with_past: Annotated[
        bool,
        typer.Option("--with-past", help="Keys and values as inputs and outputs: to generate."),
    ] = False,
    json: Json = None,
) -> None:
    """Write a quantized model to an ONNX file of integers, or a folder for vLLM or torchao.

    Example: quanttune export sst2-w8a8 --out sst2.onnx

    Example: quanttune export sst2-w8a8 --out sst2.onnx --target openvino

    Example: quanttune export smollm2-w8a8 --out smollm2-w8a8/model.onnx --with-past

    Example: quanttune export t5-w8a8 --out t5-onnx  (an encoder and a decoder: a folder)
    """
    options.one_of("--format", format, FORMATS)
    if format in FOLDERS:
        of_onnx = ("target", "act_dtype", "opset", "with_past")
        options.refuse_given(context, of_onnx, f"with --format {ONNX}")
    settings = options.dataset(model, "", task)
    with options.of_extra("deploy"):
        from ..jobs import export

        if format in FOLDERS:
            outcome = export.export_folder(settings, out, format)
        else:
            outcome = export.export(
                settings,
                out,
                target=target,
                act_dtype=act_dtype,
                opset=opset,
                with_past=with_past,
            )
    of = f", from {', '.join(outcome['inputs'])}" if "inputs" in outcome else ""
    say(f"{out}: {outcome['bytes'] / 1e6:.1f} MB{of}")
    write_numbers(json, outcome)
