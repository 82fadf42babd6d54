"""Whisper from a folder of CTranslate2, as the model of transformers with the same weights.

Layout of model.bin, and the names in it: CTranslate2's own writer, ctranslate2/specs.
"""

import json
import math
import struct
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

VERSION, REVISION = 6, 3  # of the layout, and of the names that Whisper's variables have
_DTYPES = (
    torch.float32, torch.int8, torch.int16, torch.int32, torch.float16, torch.bfloat16,
)  # fmt: skip
_MODULES = {
    "conv1": ["conv1"],
    "conv2": ["conv2"],
    "layer_norm": ["layer_norm"],
    "position_encodings": ["embed_positions"],
    "embeddings": ["embed_tokens"],
    "self_attention/layer_norm": ["self_attn_layer_norm"],
    "self_attention/linear_0": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "self_attention/linear_1": ["self_attn.out_proj"],
    "attention/layer_norm": ["encoder_attn_layer_norm"],
    "attention/linear_0": ["encoder_attn.q_proj"],
    "attention/linear_1": ["encoder_attn.k_proj", "encoder_attn.v_proj"],
    "attention/linear_2": ["encoder_attn.out_proj"],
    "ffn/layer_norm": ["final_layer_norm"],
    "ffn/linear_0": ["fc1"],
    "ffn/linear_1": ["fc2"],
}
_PARAMETERS = {"gamma": "weight", "beta": "bias", "encodings": "weight"}


def load_whisper(folder: Path) -> Any:
    """Return the WhisperForConditionalGeneration of a folder with model.bin and config.json.

    Parameters are float32 and hold the file's numbers as they are: float16 is widened. `generate`
    starts and suppresses as the folder's configuration says.

    Raises:
        ValueError: model.bin is no Whisper, of another layout, or holds integer weights.
    """
    from transformers import GenerationConfig, WhisperConfig, WhisperForConditionalGeneration

    with (folder / "model.bin").open("rb") as file:
        variables = _variables(file)
    state, starts = dict(_named(variables)), _starts(folder)
    shared = ("eos_token_id", "pad_token_id", "bos_token_id", "decoder_start_token_id")
    config = WhisperConfig(**_sizes(state, variables), **{name: starts[name] for name in shared})
    model = WhisperForConditionalGeneration(config)
    model.load_state_dict(state | {"proj_out.weight": state["model.decoder.embed_tokens.weight"]})
    model.generation_config = GenerationConfig(**starts)
    return model.eval()


def _starts(folder: Path) -> dict[str, Any]:
    """Return what `generate` begins with, suppresses and ends at."""
    suppressed = json.loads((folder / "config.json").read_text())
    tokens = (folder / "vocabulary.txt").read_text(encoding="utf-8").split("\n")
    end = tokens.index("<|endoftext|>")
    return {
        "suppress_tokens": suppressed["suppress_ids"],
        "begin_suppress_tokens": suppressed["suppress_ids_begin"],
        "decoder_start_token_id": tokens.index("<|startoftranscript|>"),
        "no_timestamps_token_id": tokens.index("<|notimestamps|>"),
        **dict.fromkeys(("eos_token_id", "pad_token_id", "bos_token_id"), end),
        "is_multilingual": False,
    }


def _variables(file: BinaryIO) -> dict[str, Tensor]:
    (version,), kind = _unpack(file, "I"), _text(file)
    (revision,) = _unpack(file, "I")
    if (version, kind, revision) != (VERSION, "WhisperSpec", REVISION):
        raise ValueError(
            f"model.bin must be WhisperSpec, revision {REVISION}, in layout {VERSION}; "
            f"got {kind}, {revision}, {version}"
        )
    return dict(_variable(file) for _ in range(*_unpack(file, "I")))


def _variable(file: BinaryIO) -> tuple[str, Tensor]:
    name = _text(file)
    (dimensions,) = _unpack(file, "B")
    shape = _unpack(file, f"{dimensions}I")
    dtype, size = _unpack(file, "BI")
    data = bytearray(file.read(size))
    if math.prod(shape) * _DTYPES[dtype].itemsize != size or len(data) != size:
        raise ValueError(f"model.bin is cut short at {name}: {len(data)} bytes of {shape}")
    return name, torch.frombuffer(data, dtype=_DTYPES[dtype]).view(shape)


def _unpack(file: BinaryIO, form: str) -> tuple[Any, ...]:
    form = f"<{form}"
    return struct.unpack(form, file.read(struct.calcsize(form)))


def _text(file: BinaryIO) -> str:
    return file.read(*_unpack(file, "H"))[:-1].decode()


def _named(variables: dict[str, Tensor]) -> Any:
    """Yield transformers' names and their parameters; some layers of the file are several here."""
    for path, value in variables.items():
        *where, parameter = path.split("/")
        if value.dim() == 0 or len(where) < 2:
            continue  # a setting, such as the number of heads
        if not value.is_floating_point():
            raise ValueError(f"weights must be floats, got {value.dtype} in {path}: quantized?")
        half, *inner = where
        prefix = f"model.{half}."
        if inner[0].startswith("layer_") and inner[0] != "layer_norm":
            prefix += f"layers.{inner.pop(0).removeprefix('layer_')}."
        modules = _MODULES["/".join(inner)]
        for module, part in zip(modules, value.float().chunk(len(modules)), strict=True):
            kind = _PARAMETERS.get(parameter, parameter)
            if not (module.endswith("k_proj") and kind == "bias"):  # Whisper's keys have none
                yield f"{prefix}{module}.{kind}", part.clone()


def _sizes(state: dict[str, Tensor], variables: dict[str, Tensor]) -> dict[str, int]:
    """Return the sizes of a model as transformers names them."""
    sizes = {
        "vocab_size": len(state["model.decoder.embed_tokens.weight"]),
        "d_model": len(state["model.encoder.layer_norm.weight"]),
        "num_mel_bins": state["model.encoder.conv1.weight"].shape[1],
        "max_source_positions": len(state["model.encoder.embed_positions.weight"]),
        "max_target_positions": len(state["model.decoder.embed_positions.weight"]),
    }
    for half in ("encoder", "decoder"):
        sizes[f"{half}_attention_heads"] = int(variables[f"{half}/num_heads"])
        sizes[f"{half}_ffn_dim"] = len(state[f"model.{half}.layers.0.fc1.weight"])
        names = {name.split(".")[3] for name in state if name.startswith(f"model.{half}.layers.")}
        sizes[f"{half}_layers"] = len(names)
    return sizes
