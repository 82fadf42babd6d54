"""An encoder and its decoder as two files, under the names of Optimum.

The decoder's is one file for a first call and for those behind it: of the encoder's states it makes
keys and values of those only that its past has none of, which are all at first, and none later.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from ..batches import arguments_of
from ..quantization.prefixes.kept_prefix import CACHES, prefix_of
from ..quantization.running import evaluating
from .past import IDS, MASK, PAST, called_as, checked_length, following, identifier, pairs, presents

STATES, STATES_MASK, HIDDEN = "encoder_hidden_states", "encoder_attention_mask", "last_hidden_state"
START, START_MASK = "decoder_input_ids", "decoder_attention_mask"
HALVES = OWN, CROSS = ("decoder.", "encoder.")  # in names: what a layer's keys are made of


def has_two_parts(model: nn.Module) -> bool:
    """Tell whether a model is an encoder with a decoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def check_parts(model: nn.Module) -> None:
    """Refuse an encoder-decoder that has no files for generation.

    Raises:
        ValueError: it has no head, takes no cache, or keeps a prefix.
    """
    name = type(model).__name__
    if model.get_output_embeddings() is None:  # type: ignore[operator]
        raise ValueError(f"with_past is for models that tell the next token: {name} has no head")
    if not signature(type(model).forward).parameters.keys() & {*CACHES}:
        raise ValueError(f"with_past needs the cache of a decoder: {name} has none")
    if prefix_of(model) is not None:
        raise ValueError(f"with_past: the decoder of {name} keeps a prefix, which no file can hold")


def encoder_call(batch: Any, model: nn.Module) -> dict[str, Tensor]:
    """Return what the encoder is called with: what it reads, and for tokens their mask."""
    main: str = model.main_input_name  # type: ignore[assignment]
    given = _given(batch, model)
    call = {main: given[main]}
    if main == IDS or (MASK in given and _reads_mask(model)):
        mask = given.get(MASK)
        call[MASK] = torch.ones_like(given[main]) if mask is None else mask
    return call


@torch.no_grad()
def decoder_call(batch: Any, model: nn.Module) -> dict[str, Tensor]:
    """Return the first call of the decoder: its tokens, the encoder's states and their mask."""
    read = encoder_call(batch, model)
    with evaluating(model), encoder_alone(model):
        states = model(**read)[HIDDEN]
    call = {IDS: _given(batch, model)[START], STATES: states}
    return {**call, STATES_MASK: read[MASK]} if MASK in read else call


@torch.no_grad()
def decoder_step(batch: Any, model: nn.Module, tokens: int = 1) -> dict[str, Tensor]:
    """Return the second call of the decoder, in which the last tokens of the first come again."""
    call = decoder_call(batch, model)
    with evaluating(model), decoder_alone(model):
        return following(call, model(**call), call[IDS][:, -tokens:])


def decoder_example(batch: Any, model: nn.Module) -> dict[str, Tensor]:
    """Return a call to trace the decoder with: its tokens and the encoder's, twice.

    The past has the first half of both.
    """
    later = decoder_step(batch, model, len(_given(batch, model)[START][0]))
    twice = {n: torch.cat([later[n]] * 2, 1) for n in (STATES, STATES_MASK) if n in later}
    return later | twice


@contextmanager
def encoder_alone(model: nn.Module, traced: Collection[str] = ()) -> Iterator[None]:
    """Let a model compute the states of its encoder.

    traced: as in `called_as`.
    """
    encoder: Any = model.get_encoder()  # type: ignore[operator]
    main: Any = model.main_input_name

    def encode(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if MASK in tensors:
            rows, own = tensors[main].shape[0], tensors[MASK].shape[0]
            torch._check_value(own == rows, partial(_differ, MASK, own, main, rows))
        return {HIDDEN: encoder(**tensors)[0]}

    with called_as(model, encode, traced):
        yield


@contextmanager
def decoder_alone(model: nn.Module, traced: Collection[str] = ()) -> Iterator[None]:
    """Let a model take the states of its encoder, and keys and values of earlier tokens, as
    tensors by name; and return the logits with those of all tokens.

    traced: as in `called_as`.
    """
    check_parts(model)
    forward: Any = model.forward
    known_names = signature(type(model).forward).parameters
    cache_name = next(name for name in CACHES if name in known_names)

    def decode(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        from transformers import DynamicCache, EncoderDecoderCache
        from transformers.modeling_outputs import BaseModelOutput

        past = {half: pairs(tensors, half) for half in HALVES}
        known = _check_lengths(tensors, past)
        halves = {half: DynamicCache(of_layers) for half, of_layers in past.items()}
        cache = EncoderDecoderCache(*halves.values())
        states = tensors[STATES]
        if known < states.shape[1]:  # in a trace always; torch cannot view no states as heads
            states, cache.is_updated = states[:, known:], {}
        mask = {MASK: tensors[STATES_MASK]} if STATES_MASK in tensors else {}
        outputs = forward(
            encoder_outputs=BaseModelOutput(last_hidden_state=states),
            decoder_input_ids=tensors[IDS],
            use_cache=True,
            return_dict=True,
            **{cache_name: cache},
            **mask,
        )
        return {"logits": outputs.logits, **presents(halves)}

    with called_as(model, decode, traced):
        yield


def encoder_dimensions(name: str) -> Mapping[int, str]:
    """Return the dimensions of an encoder's input that may have any size, and their names."""
    of_tokens = name in (IDS, MASK)
    return {0: "batch_size", **({1: "encoder_sequence_length"} if of_tokens else {})}


def decoder_dimensions(name: str) -> Mapping[int, str]:
    """Return the dimensions of a decoder's input that may have any size, and their names."""
    name = identifier(name)
    if name.startswith(identifier(PAST)):
        half = identifier(CROSS if identifier(CROSS) in name else OWN)
        return {0: "batch_size", 2: f"past_{half}sequence_length"}
    half = "decoder" if name == IDS else "encoder"
    return {0: "batch_size", 1: f"{half}_sequence_length"}


def _differ(name: str, size: Any, other: str, wanted: Any) -> str:
    return f"{name} and {other} must belong together, and are of {size} and {wanted}"


def _given(batch: Any, model: nn.Module) -> dict[str, Any]:
    """Return the arguments of a batch by name.

    Raises:
        ValueError: what the encoder reads or the decoder begins with is missing, or others are
            there, or the decoder's first token is padding, or a mask is of other tokens.
    """
    args, named = arguments_of(batch, model)
    known = list(signature(type(model).forward).parameters)[1:]
    given = {**dict(zip(known, args, strict=False)), **named}
    main: str = model.main_input_name  # type: ignore[assignment]
    taken = (main, MASK, START, START_MASK)
    others = sorted(given.keys() & {*known} - {*taken, "labels"})
    if main not in given or START not in given or others:
        raise ValueError(
            f"with_past takes {', '.join(taken)}, {main} and {START} at least: got "
            f"{', '.join(given)}"
        )
    if main == IDS and MASK in given and given[MASK].shape != given[main].shape:
        raise ValueError(_differ(MASK, given[MASK].shape, main, given[main].shape))
    if START_MASK in given and not given[START_MASK][:, 0].all():
        raise ValueError(
            f"the decoder's file takes no padding in front: {START_MASK} begins with 0"
        )
    return given


def _reads_mask(model: nn.Module) -> bool:
    """Tell whether the decoder looks at the mask of what the encoder reads."""
    return STATES_MASK in signature(model.get_decoder().forward).parameters  # type: ignore[operator]


def _check_lengths(
    tensors: Mapping[str, Tensor], past: Mapping[str, list[tuple[Tensor, ...]]]
) -> int:
    """Refuse tensors of lengths that do not belong together.

    Returns how many of the encoder's tokens have keys.
    """
    rows, (states_rows, length, _) = tensors[IDS].shape[0], tensors[STATES].shape
    _, known = (checked_length(past[half], rows) for half in HALVES)
    sizes = [(STATES, states_rows, IDS, rows)]
    if STATES_MASK in tensors:
        mask = tensors[STATES_MASK].shape
        sizes += [(STATES_MASK, mask[0], IDS, rows), (STATES_MASK, mask[1], STATES, length)]
    for name, size, other, wanted in sizes:
        torch._check_value(size == wanted, partial(_differ, name, size, other, wanted))
    torch._check_value(known <= length, lambda: f"{STATES} must be {known} long or more")
    return known
