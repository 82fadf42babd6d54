"""What NNCF makes of a float ONNX file, for OpenVINO: inputs of Linear and attention's products."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor


def is_installed() -> bool:
    return find_spec("nncf") is not None


def rows_of(data: Sequence[dict[str, Tensor]]) -> Any:
    """Return batches as NNCF takes them."""
    import nncf

    return nncf.Dataset(data, lambda batch: {name: x.numpy() for name, x in batch.items()})


def write(path: Path, data: Sequence[dict[str, Tensor]]) -> Path:
    """Quantize a float file by NNCF's settings for Transformers; return where it lies."""
    import nncf
    import openvino

    found = path.with_name(f"{path.stem}-nncf.xml")
    if not found.exists():
        source = openvino.Core().read_model(path)
        done = nncf.quantize(source, rows_of(data), model_type=nncf.ModelType.TRANSFORMER)
        openvino.save_model(done, found, compress_to_fp16=False)
    return found
