"""A quantized model in one file: safetensors, with the description as JSON in its header."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_model
from torch import Tensor, nn

from ...files import replacing
from ...transaction import transaction
from ..ties import snapshot, untie
from .description import check_loaded, describe, from_description
from .hf_config import update_hf_config

KEY = "quantization_config"  # of what a file holds beside tensors
_WORDS = {"F": "float", "BF": "bfloat", "I": "int", "U": "uint", "BOOL": "bool"}


def save(model: nn.Module, path: str | Path) -> None:
    """Write a quantized model to a safetensors file, which is there whole or not at all.

    Weights are stored in float, beside scales and ranges, in the names of the state_dict; the
    header holds the rest as JSON. For a model of transformers `save_pretrained` does the same.

    Raises:
        ValueError: the model is not quantized.
    """
    metadata = {KEY: json.dumps(describe(model))}
    with replacing(Path(path)) as partial:
        save_model(model, str(partial), metadata=metadata)


def load(model: nn.Module, path: str | Path) -> nn.Module:
    """Quantize a float model in place as a file of `save` says, load its tensors, and return it.

    Args:
        model: of the same architecture, such as `timm.create_model(name)`; its weights are
            replaced. It is left alone if anything does not fit.
        path: the file.

    Raises:
        ValueError: the file is not whole or none of `save`; its fields or tensors are not those of
            this model.
    """
    shapes, data = _read_header(Path(path))
    with transaction(model) as undo:
        from_description(model, data, undo)
        _compare(shapes, model.state_dict(), path)
        undo.callback(snapshot(model))
        untie(model, _holders_of(shapes, model))
        model.load_state_dict(load_file(path), strict=False)
        check_loaded(model)
        update_hf_config(model)
    return model


def _holders_of(stored: dict[str, str], model: nn.Module) -> list[nn.Module]:
    """Return the modules that share a parameter of which a file holds several: rotate untied them.

    `save` writes what is tied under one name.
    """
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in stored:
            names.setdefault(parameter, []).append(name)
    apart = [name for several in names.values() if len(several) > 1 for name in several]
    return [model.get_submodule(name.rpartition(".")[0]) for name in apart]


def _read_header(path: Path) -> tuple[dict[str, str], Any]:
    """Return the kinds of the tensors in a file, by name, and the description beside them."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(KEY)
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 no mapping
            kinds = {n: f"{_type(x.get_dtype())} {x.get_shape()}" for n, x in slices.items()}
    except SafetensorError as error:
        raise ValueError(f"{path} is no whole safetensors file: {error}") from error
    if text is None:
        raise ValueError(f"{path} holds no quantized model: it was not written by quanttune.save")
    try:
        return kinds, json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: the quantization is no JSON: {error}") from error


def _compare(stored: dict[str, str], wanted: dict[str, Tensor], path: str | Path) -> None:
    """Refuse tensors that are not those of a model; of tied ones a file holds one."""
    there = {tensor.data_ptr() for name, tensor in wanted.items() if name in stored}
    missing = [n for n, t in wanted.items() if n not in stored and t.data_ptr() not in there]
    unknown = [name for name in stored if name not in wanted]
    if missing or unknown:
        raise ValueError(
            f"{path} is of another model: it lacks {missing[:3]}, and has {unknown[:3]} besides"
        )
    for name, have in stored.items():
        tensor = wanted[name]
        need = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
        if have != need:
            raise ValueError(f"{path}: {name} is {have} in the file, {need} in the model")


def _type(dtype: str) -> str:
    """Return what torch calls a type of safetensors, such as F32."""
    letters = dtype.rstrip("0123456789")
    return _WORDS.get(letters, letters) + dtype.removeprefix(letters)
