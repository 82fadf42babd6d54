"""Write a quantized model's folder as an ONNX file, or as one of compressed-tensors or torchao.
What `quanttune export` does.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from PIL import Image
from torch.nn import functional as F

from ..deploy.compressed_tensors import export_compressed_tensors
from ..deploy.encoder_decoder import has_two_parts
from ..deploy.external_data import size_of
from ..deploy.onnx_export import export_onnx
from ..deploy.parts import part_files
from ..deploy.past import prompt
from ..deploy.torchao_folder import export_torchao
from ..deploy.tracing import BATCH
from . import models
from .models import ModelSource, find_model
from .settings import Settings

TEXTS = ("one two", "one two three four five six")
TEXT = {**BATCH, 1: "tokens"}
FOLDERS: Mapping[str, Callable[..., None]] = MappingProxyType(
    {"compressed-tensors": export_compressed_tensors, "torchao": export_torchao}
)


def export(
    settings: Settings,
    out: Path,
    *,
    target: str = "onnxruntime",
    act_dtype: str | None = None,
    opset: int = 20,
    with_past: bool = False,
) -> dict[str, Any]:
    """Write a quantized model to an ONNX file that takes any batch, and texts of any length.

    Of the settings the model and the task count. Inputs have the names that the model's tokenizer
    or image processor gives them. An encoder-decoder is written with_past, to a folder that also
    gets its configuration and tokenizer.

    target, act_dtype, opset, with_past: as in `export_onnx`.

    Raises:
        ValueError: the model is not quantized, or an argument does not fit.
    """
    source, model = load_calibrated(settings)
    is_folder, inputs = has_two_parts(model), example(source)
    if with_past and not is_folder:
        inputs = prompt(inputs, model)
    how: Any = {"with_past": True} if with_past or is_folder else {"dynamic": dimensions(source)}
    export_onnx(model, inputs, out, target=target, act_dtype=act_dtype, opset=opset, **how)
    if is_folder:
        _save_others(source, model, out)
    files = part_files(out).values() if is_folder else (out,)
    return {
        "out": str(out),
        "task": source.task,
        "model": source.origin,
        "inputs": {name: list(x.shape) for name, x in inputs.items()},
        "bytes": sum(map(size_of, files)),
    }


def export_folder(settings: Settings, out: Path, format: str) -> dict[str, Any]:
    """Write a quantized model to a folder of one of FOLDERS, its tokenizer too.

    Raises:
        ValueError: the model is not quantized, or otherwise than the format can say.
        FileExistsError: the folder holds something.
    """
    source, model = load_calibrated(settings)
    if has_two_parts(model):
        raise ValueError(f"{settings.model} has an encoder and a decoder: export it as onnx")
    FOLDERS[format](model, out)
    models.load_processor(source.name, source.task).save_pretrained(out)
    size = sum(path.stat().st_size for path in out.iterdir())
    return {"out": str(out), "task": source.task, "model": source.origin, "bytes": size}


def load_calibrated(settings: Settings) -> tuple[ModelSource, Any]:
    """Return where a quantized model is, and the model as it is exported.

    Raises:
        ValueError: it is not quantized.
    """
    source = find_model(settings)
    if not source.is_quantized:
        raise ValueError(f"{settings.model} is not quantized: make it so by quanttune calibrate")
    model: Any = source.load(settings.seed).cpu()
    return source, model


def dimensions(source: ModelSource) -> Mapping[int, str]:
    """Return the dimensions of a model's inputs that may have any size, and their names."""
    return BATCH if source.task == "image-classification" else TEXT


def example(source: ModelSource) -> dict[str, Any]:
    """Return two rows for a model, such as a user would feed it."""
    processor = models.load_processor(source.name, source.task)
    if source.task == "image-classification":
        images = [Image.new("RGB", (64, 64))] * 2
        return {"pixel_values": processor(images, return_tensors="pt")["pixel_values"]}
    processor.pad_token = processor.pad_token or processor.eos_token
    rows = dict(processor(list(TEXTS), padding=True, return_tensors="pt"))
    if source.task == "text2text-generation":
        ids, start = rows["input_ids"], source.config.decoder_start_token_id
        rows = {name: rows[name] for name in ("input_ids", "attention_mask")}
        rows["decoder_input_ids"] = F.pad(ids[:, :-1], (1, 0), value=start)
    return rows


def _save_others(source: ModelSource, model: Any, folder: Path) -> None:
    """Write what else is read from a folder of files, such as by Optimum, where it is not there."""
    parts = (model.config, model.generation_config, models.load_processor(source.name, source.task))
    if folder.resolve() != Path(source.name).resolve():
        for part in parts:
            part.save_pretrained(folder)
