"""Which models can keep a prefix, and what it is in theirs."""

import inspect
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..running import evaluating, main_output
from .kept_prefix import CACHES, drop_prefix, prefix_of

if TYPE_CHECKING:
    from .prefixed_cache import CachedPrefix

_CHECKED = 8  # tokens that are compared


def decoder_of(model: nn.Module) -> Any:
    """Return the part of a language model that takes a cache.

    Raises:
        ValueError: it has none, or one of another kind; it says which.
    """
    decoder, name = decoder_with_cache(model, "a prefix"), type(model).__name__
    from transformers import DynamicCache

    config = decoder.config
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("dynamic", "longrope"):
        raise ValueError(
            f"{name} turns keys by the length of the sequence (rope_type "
            f"{rope['rope_type']!r}): those of a prefix are no constants"
        )
    kinds = {type(layer).__name__ for layer in DynamicCache(config=config).layers}
    if kinds - {"DynamicLayer"}:
        raise ValueError(
            f"the layers of {name} do not all attend to all tokens, and would lose the prefix: its "
            f"cache has {', '.join(sorted(kinds))}"
        )
    return decoder


def decoder_with_cache(model: nn.Module, what: str) -> Any:
    """Return the part of a language model that takes a cache; `what` is it that needs one.

    Raises:
        ValueError: it has none, or attends both ways.
    """
    name = type(model).__name__
    transformers: Any = sys.modules.get("transformers")
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        raise ValueError(f"{what} is for language models of transformers, got {name}")
    decoder: Any = model.get_decoder()
    config = decoder.config
    arguments = inspect.signature(decoder.forward).parameters
    if config.is_encoder_decoder or not arguments.keys() & {*CACHES}:
        raise ValueError(f"{what} needs the cache of a decoder alone: {name} has none")
    if not getattr(config, "is_decoder", True) or not getattr(config, "is_causal", True):
        raise ValueError(
            f"{what} is for tokens that see those before them: {name} attends both ways"
        )
    return decoder


def keep(decoder: Any, token_ids: Sequence[int]) -> "CachedPrefix":
    """Compute the keys and values of a prefix as the decoder does, and let it keep them.

    Raises:
        ValueError: they have other sizes than those that its configuration names.
    """
    from .prefixed_cache import CachedPrefix

    _room(decoder.config, token_ids)
    tokens = torch.tensor(token_ids, device=decoder.device)
    keys, values = _keys_and_values(decoder, tokens)
    wanted = _sizes(decoder.config, len(tokens))
    if not keys.shape == values.shape == wanted:
        raise ValueError(
            f"{type(decoder).__name__} keeps keys of {tuple(keys.shape)} and values of "
            f"{tuple(values.shape)}, where attention of its sizes has {wanted}: prefix does not "
            "know its cache"
        )
    kept = CachedPrefix(tokens, keys, values)
    kept.attach(decoder)
    return kept


def renew_prefix(model: nn.Module) -> None:
    """Compute a model's prefix, if it has one, from the weights that it has by now."""
    kept: Any = prefix_of(model)
    if kept is not None:
        decoder = decoder_of(model)
        drop_prefix(model)
        try:
            kept.keys, kept.values = _keys_and_values(decoder, kept.tokens)
        finally:  # an error, too, leaves the model with what it had
            kept.attach(decoder)


@torch.no_grad()
def check_answers(model: nn.Module) -> None:
    """Refuse a model that answers otherwise than to its prefix and tokens in one sequence.

    Raises:
        ValueError: it does, and has lost its prefix.
    """
    decoder = decoder_of(model)
    kept: Any = prefix_of(model)
    count = min(_CHECKED, _room(decoder.config, kept.tokens))
    ids = torch.arange(count, device=decoder.device)[None] % decoder.config.vocab_size
    with evaluating(model):
        answer = main_output(model(input_ids=ids, use_cache=False))
        drop_prefix(model)
        whole = main_output(model(input_ids=torch.cat([kept.tokens[None], ids], 1)))
    wanted = whole[:, len(kept) :]
    away = ((answer - wanted).abs().max() / wanted.abs().max()).item()
    if not away <= torch.finfo(wanted.dtype).eps ** 0.5:
        raise ValueError(
            f"{type(model).__name__} does not answer behind a kept prefix what it does to the "
            f"whole sequence (off by {away:.2g} of the largest value): it finds its positions or "
            "masks in another way than prefix knows"
        )
    kept.attach(decoder)


@torch.no_grad()
def _keys_and_values(decoder: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    from transformers import DynamicCache

    cache = DynamicCache(config=decoder.config)
    arguments = inspect.signature(decoder.forward).parameters
    name = next(name for name in CACHES if name in arguments)
    with evaluating(decoder):
        decoder(input_ids=tokens[None], use_cache=True, **{name: cache})
    keys, values = ([getattr(x, name)[0] for x in cache.layers] for name in ("keys", "values"))
    return torch.stack(keys), torch.stack(values)


def described_prefix(model: nn.Module) -> dict[str, Any]:
    """Return what a description says of a model's prefix: nothing, if it has none."""
    kept = prefix_of(model)
    return {} if kept is None else {"prefix": {"tokens": kept.tokens.tolist()}}


def add_described_prefix(
    model: nn.Module, described: Mapping[str, Any] | None, undo: ExitStack
) -> None:
    """Give a model the prefix of another, whose keys and values are loaded later, or none.

    Raises:
        ValueError: it can keep none, or none so long.
    """
    before: Any = prefix_of(model)
    if before is not None:
        drop_prefix(model)
        undo.callback(before.attach, decoder_of(model))
    if described is None:
        return
    decoder = decoder_of(model)
    undo.callback(drop_prefix, model)
    config, tokens = decoder.config, described["tokens"]
    _room(config, tokens)
    from .prefixed_cache import CachedPrefix

    sizes = _sizes(config, len(tokens))
    empty = [torch.zeros(sizes, dtype=decoder.dtype, device=decoder.device) for _ in range(2)]
    CachedPrefix(torch.tensor(tokens, device=decoder.device), *empty).attach(decoder)


def _room(config: Any, token_ids: Sequence[int]) -> int:
    """Return how many tokens a model takes behind a prefix; refuse one that leaves none."""
    longest = getattr(config, "max_position_embeddings", 1 << 30)
    if len(token_ids) >= longest:
        raise ValueError(
            f"prefix.tokens are {len(token_ids)}, of {longest} that the model takes at once"
        )
    return int(longest - len(token_ids))


def _sizes(config: Any, tokens: int) -> tuple[int, ...]:
    """Return the sizes of keys, and values: layers, heads, tokens, channels."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    channels = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_hidden_layers, heads, tokens, channels
