"""Load the weights of a checkpoint into a model that trains: all of them, or none."""

import copy
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel, logging
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)

_UNREADABLE = RuntimeError, EOFError, UnpicklingError  # what torch.load raises
_COMPILED = "_orig_mod."  # what torch.compile puts before each name


def has_weights(checkpoint: Path) -> bool:
    """Tell whether a checkpoint holds the weights of a whole model."""
    return bool(_files(checkpoint))


def load_weights(model: nn.Module, checkpoint: Path) -> None:
    """Load a checkpoint into a model, whatever names transformers saved it under.

    transformers saves ViT, Swin, Mixtral and others under names of earlier versions. Its Trainer
    looks for those of the model and leaves out what it does not find, so that a training goes on
    with weights that were never loaded. Names that tied weights have beside the saved one may be
    missing.

    Args:
        model: not wrapped, compiled or not.
        checkpoint: a folder with model.safetensors or pytorch_model.bin, in one file or in shards.

    Raises:
        ValueError: a name is missing or one too many, a shape is another one, or a file is damaged.
            The model is as it was.
    """
    state = {name.replace(_COMPILED, ""): x for name, x in _read(checkpoint).items()}
    wrong = list(_differences(model, state))
    if wrong and isinstance(model, PreTrainedModel):
        state, wrong = _converted(model, state)
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(
            f"{checkpoint} is not of this {type(model).__name__}, and nothing was loaded: "
            f"{', '.join(wrong[:3])}{more}. Resume from another checkpoint, or with the model that "
            "was trained"
        )
    model.load_state_dict(state, strict=False)


def _files(checkpoint: Path) -> list[Path]:
    for whole, index in (
        (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME),
        (WEIGHTS_NAME, WEIGHTS_INDEX_NAME),
    ):
        if (checkpoint / whole).is_file():
            return [checkpoint / whole]
        if (checkpoint / index).is_file():
            return _shards(checkpoint / index)
    return []


def _shards(index: Path) -> list[Path]:
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if strange := [name for name in shards if Path(name).name != name]:
            raise ValueError(f"{strange[0]!r} is no name of a file beside it")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index} is damaged: {error!r}") from error
    return sorted(index.with_name(name) for name in shards)


def _read(checkpoint: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for file in _files(checkpoint):
        try:
            if file.suffix == ".safetensors":
                state |= load_file(file)
            else:
                state |= torch.load(file, map_location="cpu", weights_only=True)
        except (SafetensorError, FileNotFoundError, *_UNREADABLE) as error:
            raise ValueError(f"{file} is damaged: {error}") from error
    return state


def _differences(model: nn.Module, state: Mapping[str, Tensor]) -> Iterator[str]:
    """Say what a model needs of a state and does not find, and what it would not use."""
    own = model.state_dict(keep_vars=True)
    loaded = {id(own[name]) for name in state if name in own}
    for name, x in own.items():
        if name in state and isinstance(x, Tensor) and state[name].shape != x.shape:
            yield f"{name} has shape {tuple(state[name].shape)} instead of {tuple(x.shape)}"
        elif name not in state and id(x) not in loaded:
            yield f"{name} is missing"
    yield from (f"{name} is not expected" for name in state if name not in own)


def _converted(
    model: PreTrainedModel, state: dict[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """Return a state by the names of the model, as from_pretrained makes it, and what is wrong."""
    types = {p.dtype for p in model.parameters() if p.is_floating_point()}
    before = logging.get_verbosity()
    logging.set_verbosity_error()  # what it would report is refused
    try:
        fresh, found = type(model).from_pretrained(
            None,
            config=copy.deepcopy(model.config),
            state_dict=state,
            dtype=types.pop() if len(types) == 1 else torch.promote_types(*list(types)[:2]),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # else it raises, and says which in a log alone
        )
    except (RuntimeError, AttributeError):  # its message points to the log
        return state, ["parts of some weights are missing or have other shapes"]
    finally:
        logging.set_verbosity(before)
    return fresh.state_dict(), list(_reported(found))


def _reported(found: Mapping[str, Any]) -> Iterator[str]:
    yield from (f"{name} is missing" for name in sorted(found["missing_keys"]))
    yield from (f"{name} is not expected" for name in sorted(found["unexpected_keys"]))
    for name, was, wanted in sorted(found["mismatched_keys"]):
        yield f"{name} has shape {tuple(was)} instead of {tuple(wanted)}"
    yield from map(str, found["error_msgs"])
