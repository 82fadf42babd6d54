"""A prefix in the cache of transformers, which a decoder finds there whenever it is called."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import Cache, DynamicCache

from .kept_prefix import CACHES, NAME, KeptPrefix


class PrefixedCache(Cache):
    """What attention sees in one forward: the prefix, and behind it `inner`, or nothing kept.

    `inner` never holds the prefix, so that it is cropped, reordered and measured as without.
    """

    def __init__(self, prefix: KeptPrefix, inner: Cache | None) -> None:
        super().__init__(layers=[] if inner is None else inner.layers)
        self.prefix, self.inner = prefix, inner

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        found = key_states, value_states
        if self.inner is not None:
            found = self.inner.update(*found, layer_idx, *args, **kwargs)
        kept = self.prefix.keys[layer_idx], self.prefix.values[layer_idx]
        keys, values = (
            torch.cat([first.to(x.dtype).expand(x.shape[0], -1, -1, -1), x], dim=-2)
            for first, x in zip(kept, found, strict=True)
        )
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        past = 0 if self.inner is None else self.inner.get_seq_length(layer_idx)
        return len(self.prefix) + past

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        length, offset = query_length, 0
        if self.inner is not None:
            length, offset = self.inner.get_mask_sizes(query_length, layer_idx)
        return len(self.prefix) + length, offset


class CachedPrefix(KeptPrefix):
    """A prefix that puts itself into the calls of a decoder.

    Callers see nothing of it: caches, masks and positions that they hand over, and get back, are
    those of their own tokens.
    """

    _arguments: tuple[str, ...] = ()

    def attach(self, decoder: nn.Module) -> None:
        """Let a decoder call it, and hold it."""
        self._arguments = tuple(inspect.signature(decoder.forward).parameters)
        decoder.add_module(NAME, self)
        enter = decoder.register_forward_pre_hook(self.enter, prepend=True, with_kwargs=True)
        self.handles = [enter, decoder.register_forward_hook(self.leave)]

    def enter(
        self, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Put the prefix before the keys, the mask and the positions of a call."""
        given = dict(zip(self._arguments, args, strict=False)) | kwargs
        caches = [given.pop(name, None) for name in CACHES]
        cache = next((one for one in caches if one is not None), None)
        past = 0 if cache is None else cache.get_seq_length()
        if "position_ids" in self._arguments:
            given["position_ids"] = len(self) + _positions(given, past)
        given["attention_mask"] = _extended(given.get("attention_mask"), len(self))
        wanted = given.get("use_cache")
        if cache is None and (decoder.config.use_cache if wanted is None else wanted):
            cache = DynamicCache(config=decoder.config)
        name = next(name for name in CACHES if name in self._arguments)
        return (), given | {name: PrefixedCache(self, cache)}

    def leave(self, decoder: nn.Module, args: Any, output: Any) -> Any:
        """Return what the decoder does, with the cache that its caller knows."""
        if isinstance(output, Mapping):
            return type(output)(**{name: _inner(value) for name, value in output.items()})
        if isinstance(output, tuple):
            found = [_inner(value) for value in output]
            return tuple(value for value in found if value is not None)
        return output


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, PrefixedCache) else value


def _positions(given: Mapping[str, Any], past: Any) -> Tensor:
    """Return the positions of a call's tokens; padding before them is not counted."""
    if (known := given.get("position_ids")) is not None:
        return known  # type: ignore[no-any-return]
    x, mask = given.get("input_ids"), given.get("attention_mask")
    x = given["inputs_embeds"] if x is None else x
    if mask is not None and mask.dim() == 2:
        return (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -x.shape[1] :]  # type: ignore[no-any-return]
    return torch.arange(x.shape[1], device=x.device)[None] + past


def _extended(mask: Any, tokens: int) -> Any:
    """Return a mask in which every query sees the prefix, too."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise TypeError(
            f"a model with a kept prefix takes masks that are tensors, got {type(mask).__name__}: "
            'choose another attention, such as model.set_attn_implementation("sdpa")'
        )
    # of four dimensions, as generate makes it for a static cache, it may be added to scores
    seen = 0.0 if mask.dim() == 4 and mask.is_floating_point() else 1
    return F.pad(mask, (tokens, 0), value=seen)
