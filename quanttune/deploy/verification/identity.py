"""Whether a file is one of a model: by what it says of itself, and by the tensors that it holds."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...quantization.saving.description import describe, described_sites
from ...quantization.saving.safetensors_file import KEY
from ...quantization.saving.schema import check
from ..integer_weights import integer_weights

if TYPE_CHECKING:
    import numpy as np
    import onnx


def check_description(model: nn.Module, file: "onnx.ModelProto", path: Path) -> None:
    """Refuse a file that says that it is of another model, or quantized otherwise.

    Raises:
        ValueError: the first thing that differs.
    """
    text = {entry.key: entry.value for entry in file.metadata_props}.get(KEY)
    if text is None:
        raise ValueError(
            f"{path} does not say how it was quantized: it is not whole, or was not written by "
            "export_onnx"
        )
    try:
        said = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: the quantization is no JSON: {error}") from error
    check(said)
    own = json.loads(json.dumps(describe(model)))
    for difference in _differences(said, own):
        raise ValueError(f"{path} is of another model: {difference}")


def check_shapes(
    wanted: dict[str, torch.Tensor], stored: "dict[str, np.ndarray[Any, Any]]", path: Path
) -> None:
    """Refuse a file whose tensors have other shapes than those of the model.

    Raises:
        ValueError: the first that has.
    """
    for name, tensor in wanted.items():
        if name in stored and stored[name].shape != tensor.shape:
            raise ValueError(
                f"{path} is of another model: {name} is {list(stored[name].shape)} in the file, "
                f"{list(tensor.shape)} in the model"
            )


def tensors_of(model: nn.Module, dtype: str) -> dict[str, torch.Tensor]:
    """Return what a file of the model may hold under these names; the exporter merges equal ones.

    Weights are integers, as export_onnx stores them.
    """
    with integer_weights(model, dtype):
        return {name: x.detach().cpu() for name, x in model.state_dict(keep_vars=True).items()}


def _differences(said: dict[str, Any], own: dict[str, Any]) -> Iterator[str]:
    there, here = described_sites(said), described_sites(own)
    yield from (f"it has no site {site}" for site in here if site not in there)
    yield from (f"it has a site {site}, the model has none" for site in there if site not in here)
    for name, value in own["scheme"].items():
        if said["scheme"][name] != value:
            yield f"{name} is {said['scheme'][name]!r} in the file, {value!r} in the model"
    for site, arguments in here.items():
        if arguments != there[site]:
            yield f"{site} is {there[site]} in the file, {arguments} in the model"
