"""The calls that a file with keys and values is compared by, and those of an encoder."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...quantization.prefixes.kept_prefix import prefix_length
from ..encoder_decoder import CROSS, STATES, STATES_MASK, decoder_call, encoder_call
from ..parts import DECODER, ENCODER, Part
from ..past import IDS, MASK, PAST, PRESENT, following, prompt

STEPS = 8  # of one token each
PRESENTS = "keys and values"  # of all layers
_LONGEST = ("max_position_embeddings", "max_target_positions")  # what configurations call it
Call = dict[str, Tensor]


def calls_of(part: Part, model: nn.Module, data: Iterable[Any]) -> Iterator[Call]:
    """Yield what a file and the model, which computes what is in it, are both called with."""
    if part is ENCODER:
        return (encoder_call(batch, model) for batch in data)
    return _stepwise(model, data, decoder_call if part is DECODER else prompt)


def _stepwise(
    model: nn.Module, data: Iterable[Any], first_call: Callable[[Any, nn.Module], Call]
) -> Iterator[Call]:
    """Yield the calls of each batch: one with a past of half the tokens, then as in generation.

    Of an encoder's tokens, too, the past has half the keys. The keys and values, and the tokens
    that are added, are those of the model.
    """
    for batch in data:
        call = first_call(batch, model)
        if half := call[IDS].shape[1] // 2:
            yield _second_half(model, call, half)
        yield call
        for _ in range(_room(model, call)):
            outputs = model(**call)
            call = following(call, outputs, outputs["logits"][:, -1:].argmax(-1))
            yield call


def _second_half(model: nn.Module, call: Call, half: int) -> Call:
    of_encoder = {name: call[name] for name in (STATES, STATES_MASK) if name in call}
    own = {name: x for name, x in call.items() if name not in of_encoder}
    outputs = model(**{name: x[:, :half] for name, x in own.items()}, **of_encoder)
    later = {name: x if name == MASK else x[:, half:] for name, x in own.items()}
    past = following(call, outputs, later[IDS])
    for name in past:
        if name.startswith(PAST) and CROSS in name:
            past[name] = past[name][:, :, : past[name].shape[2] // 2]
    return {**past, **later}


def compared(call: Mapping[str, Tensor], outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the logits of tokens that are no padding, and the keys and values of all as one."""

    def kept(x: Tensor, mask: Tensor | None) -> Tensor:
        return x.flatten(0, 1) if mask is None else x[mask.bool()]

    tokens = call.get(MASK)
    presents = {name: x.transpose(1, 2) for name, x in outputs.items() if name.startswith(PRESENT)}
    masks = {name: call.get(STATES_MASK) if CROSS in name else tokens for name in presents}
    new = tokens if tokens is None else tokens[:, -call[IDS].shape[1] :]
    return {
        **{name: x for name, x in outputs.items() if name not in presents},
        "logits": kept(outputs["logits"], new),
        PRESENTS: torch.cat([kept(x, masks[name]).flatten() for name, x in presents.items()]),
    }


def _room(model: nn.Module, call: Call) -> int:
    """Return how many tokens to add: a few, or as many as the model takes."""
    of_model: Any = model.config
    config = of_model.get_text_config(decoder=True)
    longest = min(getattr(config, name, None) or 1 << 30 for name in _LONGEST)
    return max(0, min(STEPS, longest - prefix_length(model) - call.get(MASK, call[IDS]).shape[1]))
