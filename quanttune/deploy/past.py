"""Keys and values of earlier tokens as inputs and outputs of a file, under the names of Optimum.

A first call has none of them; a later one takes as its past what the call before returned.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from inspect import Parameter, Signature, signature
from typing import Any

import torch
from torch import Tensor, nn

from ..batches import arguments_of
from ..quantization.prefixes.decoder import decoder_with_cache
from ..quantization.prefixes.kept_prefix import CACHES
from ..quantization.running import evaluating

IDS, MASK, POSITIONS = INPUTS = ("input_ids", "attention_mask", "position_ids")
PAST, PRESENT = "past_key_values.", "present."
PARTS = ("key", "value")
_TOKENS = {0: "batch_size", 1: "sequence_length"}
_KEYS = {0: "batch_size", 2: "past_sequence_length"}


def dimensions(name: str) -> Mapping[int, str]:
    """Return the dimensions of an input that may have any size, and their names."""
    return _KEYS if identifier(name).startswith(identifier(PAST)) else _TOKENS


def identifier(name: str) -> str:
    """Return what stands for an input's name in a program of PyTorch, which is Python."""
    return name.replace(".", "_")


def has_past(names: Collection[str]) -> bool:
    """Tell by the names of a file's inputs or outputs whether keys and values are among them."""
    return any(name.startswith((PAST, PRESENT)) for name in names)


def prompt(batch: Any, model: nn.Module) -> dict[str, Tensor]:
    """Return the first call of a sequence: token ids, their mask and, if it has any, positions.

    Rows that are padded behind their last token are turned: what follows is added there. Labels,
    and what the model has no argument for, are left out.

    Raises:
        ValueError: the batch holds other inputs, or no token ids.
    """
    args, given = arguments_of(batch, model)
    given = {**dict(zip(INPUTS, args, strict=False)), **given}
    known = signature(type(model).forward).parameters
    others = sorted(given.keys() & known.keys() - {*INPUTS, "labels"})
    if IDS not in given or others:
        raise ValueError(
            f"with_past takes {', '.join(INPUTS)}, and {IDS} at least: got {', '.join(given)}"
        )
    ids = given[IDS]
    mask = given.get(MASK)
    mask = torch.ones_like(ids) if mask is None else mask
    call = {IDS: ids, MASK: mask}
    if POSITIONS in known:
        places = given.get(POSITIONS)
        call[POSITIONS] = positions(mask) if places is None else places
    behind = mask.flip(1).argmax(1, keepdim=True)  # padding of each row
    order = (torch.arange(ids.shape[1], device=ids.device) - behind) % ids.shape[1]
    return {name: x.expand_as(ids).gather(1, order) for name, x in call.items()}


def positions(mask: Tensor) -> Tensor:
    """Return the positions of tokens, of which padding has none."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


@torch.no_grad()
def example(batch: Any, model: nn.Module) -> dict[str, Tensor]:
    """Return a call that has a past to trace a model with: the tokens of a batch, twice."""
    with evaluating(model), with_past(model):
        call = prompt(batch, model)
        return following(call, model(**call), call[IDS])


def following(
    call: Mapping[str, Tensor], outputs: Mapping[str, Tensor], ids: Tensor
) -> dict[str, Tensor]:
    """Return the call behind another one, with token ids (rows, tokens) and what that returned."""
    found = {**call, IDS: ids}
    if MASK in call:
        found[MASK] = torch.cat([call[MASK], torch.ones_like(ids)], 1)
    if POSITIONS in call:
        steps = torch.arange(1, ids.shape[1] + 1, device=ids.device)
        found[POSITIONS] = call[POSITIONS][:, -1:] + steps
    past = {n.replace(PRESENT, PAST): x for n, x in outputs.items() if n.startswith(PRESENT)}
    return found | past


@contextmanager
def with_past(model: nn.Module, traced: Collection[str] = ()) -> Iterator[None]:
    """Let a decoder take keys and values as tensors by name, and return those of all its tokens.

    Meanwhile its outputs are a dictionary of `logits` and the present keys and values. A prefix
    that it keeps is not among them.

    traced: as in `called_as`.
    """
    cache_name = _cache_argument(model)
    forward: Any = model.forward

    def flat(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        past = pairs(tensors)
        _check_lengths(tensors, past)
        from transformers import DynamicCache

        # not of the configuration: it keeps all keys, and a window is a matter of the mask
        cache = DynamicCache(past)
        inputs = {name: tensors[name] for name in INPUTS if name in tensors}
        outputs = forward(**inputs, use_cache=True, return_dict=True, **{cache_name: cache})
        return {"logits": outputs.logits, **presents({"": cache})}

    with called_as(model, flat, traced):
        yield


@contextmanager
def called_as(
    model: nn.Module,
    forward: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    traced: Collection[str] = (),
) -> Iterator[None]:
    """Let a model compute something else from tensors by name.

    traced: the names of what a trace calls it with, which takes them from its signature.
    """

    def flat(**tensors: Tensor) -> dict[str, Tensor]:
        return forward({identifier(name): x for name, x in tensors.items()})

    if traced:  # not by **: of sizes that must be equal a program would hold guards without names
        arguments = [Parameter(identifier(x), Parameter.KEYWORD_ONLY) for x in traced]
        flat.__signature__ = Signature(arguments)  # type: ignore[attr-defined]
    with calling(model, flat):
        yield


@contextmanager
def calling(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let a module be called as a function; a forward of its own comes back."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def _cache_argument(model: nn.Module) -> str:
    """Return the argument that takes a decoder's cache.

    Raises:
        ValueError: it keeps something else than keys and values of all tokens, or has no head.
    """
    decoder, name = decoder_with_cache(model, "with_past"), type(model).__name__
    from transformers import DynamicCache

    kinds = {type(layer).__name__ for layer in DynamicCache(config=decoder.config).layers}
    if others := kinds - {"DynamicLayer", "DynamicSlidingWindowLayer"}:
        raise ValueError(
            f"with_past is for layers that keep keys and values: the cache of {name} has "
            f"{', '.join(sorted(others))}"
        )
    if model.get_output_embeddings() is None:  # type: ignore[operator]
        raise ValueError(f"with_past is for models that tell the next token: {name} has no head")
    arguments = signature(decoder.forward).parameters
    return next(argument for argument in CACHES if argument in arguments)


def pairs(tensors: Mapping[str, Tensor], of: str = "") -> list[tuple[Tensor, ...]]:
    """Return the keys and values of each layer; none in a first call.

    tensors: by identifiers. of: what stands before the part in their names.
    """
    names = [identifier(f".{of}{part}") for part in PARTS]
    layers = sum(x.startswith(identifier(PAST)) and x.endswith(names[0]) for x in tensors)
    return [tuple(tensors[f"{identifier(PAST)}{i}{x}"] for x in names) for i in range(layers)]


def presents(caches: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the keys and values of caches by name, layer by layer.

    caches: by what stands before the part in the names.
    """
    layers = zip(*(cache.layers for cache in caches.values()), strict=True)
    return {
        f"{PRESENT}{i}.{of}{part}": getattr(layer, f"{part}s")
        for i, of_layer in enumerate(layers)
        for of, layer in zip(caches, of_layer, strict=True)
        for part in PARTS
    }


def checked_length(past: list[tuple[Tensor, ...]], rows: int) -> int:
    """Return of how many tokens keys and values are; refuse those that do not belong together.

    A trace learns from it which sizes are one.
    """
    length = past[0][0].shape[2] if past else 0
    for x in (x for pair in past for x in pair):
        torch._check_value(x.shape[0] == rows, lambda: f"keys of {rows} rows wanted")
        torch._check_value(x.shape[2] == length, lambda: f"keys of {length} tokens wanted")
    return length


def _check_lengths(tensors: Mapping[str, Tensor], past: list[tuple[Tensor, ...]]) -> None:
    """Refuse tensors of lengths that do not belong together."""
    rows, tokens = tensors[IDS].shape
    length, mask = checked_length(past, rows), tensors[MASK].shape
    torch._check_value(mask[0] == rows, lambda: f"{MASK} has {mask[0]} rows, {IDS} has {rows}")
    torch._check_value(
        mask[1] == length + tokens,
        lambda: f"{MASK} must be {length} + {tokens} long, got {mask[1]}",
    )
