"""How to make a small model of each kind that the support matrix names.

A model comes in candidates, the smallest first, since not every constructor takes every size. The
caller takes the first that runs.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import timm
import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto import modeling_auto

BATCH = 3
CLASSES = 7
WORDS = 99
TOKENS = 8

# what a configuration has of these, as a plain number, is made this small
SIZES: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("num_encoder_layers", "entity_emb_size", "num_ngram"), 2),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_head", "n_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_encoder_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "dff", "dim_ff", "hidden_dim"), 64),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "moe_intermediate_size"), 64),
    **dict.fromkeys(("head_dim", "d_kv", "dim_head", "rotary_dim"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_source_positions"), 64),
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "embedding_size": 16,
    "projection_dim": 16,
    "vocab_size": WORDS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "image_size": 64,
    "num_mel_bins": 16,
    "max_length": 64,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "n_group": 1,
    "topk_group": 1,
    "input_feat_per_channel": 16,
}

# where these do not go together
SPECIAL: dict[str, dict[str, Any]] = {
    "bigbird_pegasus": {"attention_type": "original_full"},
    "convnext": {"num_stages": 4},
    "convnextv2": {"num_stages": 4},
    "deepseek_v2": {"num_key_value_heads": 4},
    "deepseek_v3": {"num_key_value_heads": 4},
    "gpt_neo": {"num_layers": 24},
    "lilt": {"hidden_size": 48},
    "mamba2": {"num_heads": 8},
    "squeezebert": {"embedding_size": 32},
    "swin": {"window_size": 2},
    "swin2sr": {"embed_dim": 36},
    "xmod": {"default_language": "en_XX"},
}


@dataclass(frozen=True)
class Candidate:
    """A small model that may or may not run, with its input."""

    configuration: str
    make: Callable[[], tuple[nn.Module, dict[str, Tensor]]]


def candidates(library: str, name: str) -> Iterator[Candidate]:
    """Return what to try, the smallest first."""
    return {"timm": _of_timm, "transformers": _of_transformers}[library](name)


# ------------------------------------------------------------------------------------------- timm


def _of_timm(name: str) -> Iterator[Candidate]:
    with torch.device("meta"):
        whole = timm.create_model(name)
    takes = inspect.signature(type(whole)).parameters
    default = timm.get_pretrained_cfg(name).input_size
    sizes = [size for size in (64, 112, 128) if size < default[1]] + [default[1]]
    for small, size in product(_smaller(takes), sizes):
        options = {**small, **({"img_size": size} if "img_size" in takes else {})}
        if "num_classes" in takes and getattr(whole, "num_classes", 0):
            options["num_classes"] = CLASSES
        text = ", ".join(f"{k}={v}" for k, v in (small | {"input": size}).items())
        yield Candidate(text, lambda o=options, s=size: _timm_model(name, o, default[0], s))


def _smaller(takes: Mapping[str, inspect.Parameter]) -> list[dict[str, Any]]:
    """Return what to tell a constructor that takes these, so that the model becomes small."""
    kinds = {key: type(parameter.default) for key, parameter in takes.items()}
    options: list[dict[str, Any]] = []
    if "depth" in kinds:
        if kinds.get("embed_dim") is int and kinds.get("num_heads") is int:
            options.append({"depth": 2, "embed_dim": 96, "num_heads": 3})
        options.append({"depth": 2})
    if "depths" in kinds:
        four = {"depths": (1, 1, 2, 1)}
        if "dims" in kinds:
            options.append(four | {"dims": (24, 48, 72, 96)})
        if kinds.get("embed_dim") is int:
            options.append(four | {"embed_dim": 48})
        options += [four, {"depths": (1, 1, 2)}]
    if kinds.get("stages") is tuple:
        options.append({"stages": (1, 1, 1, 1)})
    return [*options, {}]


def _timm_model(
    name: str, options: dict[str, Any], channels: int, size: int
) -> tuple[nn.Module, dict[str, Tensor]]:
    model = timm.create_model(name, **options)
    first = next(iter(inspect.signature(model.forward).parameters))
    return model, {first: torch.randn(BATCH, channels, size, size)}


# ----------------------------------------------------------------------------------- transformers


def _of_transformers(name: str) -> Iterator[Candidate]:
    config = _shrunk(CONFIG_MAPPING[name](), SIZES | SPECIAL.get(name, {}))
    yield Candidate("small", lambda: _transformers_model(name, config()))


def _shrunk(default: PreTrainedConfig, sizes: dict[str, Any]) -> Callable[[], PreTrainedConfig]:
    """Return how to make the configuration anew with these sizes, also those of its parts."""
    options: dict[str, Any] = {}
    for key, value in default.to_dict().items():
        part = getattr(default, key, None)
        if isinstance(part, PreTrainedConfig):
            options[key] = _shrunk(part, sizes)().to_dict()
        elif key in sizes and (value is None or type(value) is type(sizes[key])):
            options[key] = sizes[key]
        elif key == "depths":
            options[key] = [2, *[1] * (len(value) - 1)]
    for alias, key in default.attribute_map.items():
        if alias in sizes and type(getattr(default, key, None)) is int:
            options.setdefault(key, sizes[alias])
    return lambda: type(default)(**options, use_cache=False)


def _transformers_model(name: str, config: PreTrainedConfig) -> tuple[nn.Module, dict[str, Tensor]]:
    model = _class_of(name)(config)
    return model, _inputs(model, config)


def _class_of(name: str) -> Any:
    """Return the class with the head that the model is mostly used with."""
    tables = {
        key: getattr(modeling_auto, f"MODEL_{key}MAPPING_NAMES")
        for key in (
            "FOR_IMAGE_CLASSIFICATION_",
            "FOR_SEQ_TO_SEQ_CAUSAL_LM_",
            "FOR_SPEECH_SEQ_2_SEQ_",
            "FOR_CTC_",
            "FOR_SEQUENCE_CLASSIFICATION_",
            "FOR_CAUSAL_LM_",
            "",
        )
    }
    if name not in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        tables.pop("FOR_SEQUENCE_CLASSIFICATION_")  # those of decoders look for the last token
    found = next(table[name] for table in tables.values() if name in table)
    return getattr(transformers, found if isinstance(found, str) else found[0])


def _inputs(model: nn.Module, config: Any) -> dict[str, Tensor]:
    takes = inspect.signature(model.forward).parameters
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", None) or 64
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    words = torch.randint(2, WORDS, (BATCH, TOKENS))
    bands = getattr(config, "num_mel_bins", 16)
    spectrum, wave = torch.randn(BATCH, 64, bands), torch.randn(BATCH, 8000)
    if config.model_type == "whisper":
        spectrum = torch.randn(BATCH, bands, 2 * config.max_source_positions)
    if config.model_type == "wav2vec2-bert":
        spectrum = torch.randn(BATCH, 64, config.feature_projection_input_dim)
    is_spectrogram = config.model_type == "audio-spectrogram-transformer"
    known = {
        "pixel_values": torch.randn(BATCH, getattr(vision, "num_channels", 3), height, width),
        "input_values": spectrum if is_spectrogram else wave,
        "input_features": spectrum,
        "past_values": torch.randn(BATCH, getattr(config, "context_length", 32), 1),
        "input_ids": words,
        "decoder_input_ids": words.clone(),
    }
    return {key: value for key, value in known.items() if key in takes}
