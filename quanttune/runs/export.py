"""Write a quantized model's folder as an ONNX file. What `quanttune export` does."""

from pathlib import Path
from typing import Any

from PIL import Image

from ..export.onnx_export import BATCH, export_onnx
from . import models
from .inputs import find
from .settings import Settings

TEXTS = ("one two", "one two three four five six")
TEXT = {**BATCH, 1: "tokens"}


def export(
    settings: Settings, out: Path, *, act_dtype: str = "uint8", opset: int = 20
) -> dict[str, Any]:
    """Write a quantized model to an ONNX file that takes any batch, and texts of any length.

    Of the settings the model and the task count. Inputs have the names that the model's tokenizer
    or image processor gives them.

    Raises:
        ValueError: the model is not quantized, or an argument does not fit.
    """
    source = find(settings)
    if not source.is_quantized:
        raise ValueError(f"{settings.model} is not quantized: make it so by quanttune calibrate")
    model: Any = source.load(settings.seed).cpu()
    is_image = source.task == "image-classification"
    inputs = _example(models.load_processor(source.name, source.task), is_image)
    dynamic = BATCH if is_image else TEXT
    export_onnx(model, inputs, out, act_dtype=act_dtype, opset=opset, dynamic=dynamic)
    return {
        "out": str(out),
        "task": source.task,
        "model": source.origin,
        "inputs": {name: list(x.shape) for name, x in inputs.items()},
        "bytes": out.stat().st_size,
    }


def _example(processor: Any, is_image: bool) -> dict[str, Any]:
    """Return two rows, such as a user would feed them."""
    if is_image:
        images = [Image.new("RGB", (64, 64))] * 2
        return {"pixel_values": processor(images, return_tensors="pt")["pixel_values"]}
    processor.pad_token = processor.pad_token or processor.eos_token
    return dict(processor(list(TEXTS), padding=True, return_tensors="pt"))
