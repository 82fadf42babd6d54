"""Files of an encoder and its decoder in the place of the model, for `generate`."""

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..quantization.prefixes.kept_prefix import CACHES
from .encoder_decoder import CROSS, HIDDEN, OWN, STATES, STATES_MASK
from .onnx_model import OnnxModel
from .parts import DECODER, ENCODER
from .past import IDS, MASK, PARTS, PAST, PRESENT, calling


@contextmanager
def computed_by(folder: Path, model: nn.Module, threads: int = 1) -> Iterator[None]:
    """Let an encoder-decoder of transformers take its states and logits from the files of a folder.

    What it does with them, such as to choose tokens, stays its own. Files and tokens are on the
    CPU.
    """
    from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

    encoder, decoder = (OnnxModel(folder / p.file, threads=threads) for p in (ENCODER, DECODER))
    known = signature(type(model).forward).parameters
    cache_name = next(name for name in CACHES if name in known)

    # `generate` looks for the name kwargs, else it gives them no masks
    def encode(*args: Tensor, **kwargs: Any) -> Any:
        return BaseModelOutput(last_hidden_state=encoder(*args, **kwargs)[HIDDEN])

    def decode(decoder_input_ids: Tensor, encoder_outputs: Any, **kwargs: Any) -> Any:
        call = {IDS: decoder_input_ids, STATES: encoder_outputs[0], STATES_MASK: kwargs.get(MASK)}
        found = decoder(**call, **_past(kwargs.get(cache_name)))
        return Seq2SeqLMOutput(logits=found["logits"], **{cache_name: _cache(found)})

    part: Any = model.get_encoder()  # type: ignore[operator]
    with calling(part, encode), calling(model, decode):
        yield


def _past(cache: Any) -> dict[str, Tensor]:
    """Return the keys and values of a cache, if it has any, by the names of a file's inputs."""
    if cache is None or not cache.get_seq_length():
        return {}
    halves = {OWN: cache.self_attention_cache, CROSS: cache.cross_attention_cache}
    return {
        f"{PAST}{i}.{half}{part}": getattr(layer, f"{part}s")
        for half, layers in halves.items()
        for i, layer in enumerate(layers.layers)
        for part in PARTS
    }


def _cache(found: dict[str, Tensor]) -> Any:
    """Return the cache of what a file returned."""
    from transformers import DynamicCache, EncoderDecoderCache

    count = sum(name.startswith(PRESENT) for name in found) // 4
    return EncoderDecoderCache(
        *(
            DynamicCache(
                [tuple(found[f"{PRESENT}{i}.{half}{p}"] for p in PARTS) for i in range(count)]
            )
            for half in (OWN, CROSS)
        )
    )
