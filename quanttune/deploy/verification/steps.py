"""The calls of a decoder that a file with keys and values is compared by."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...quantization.prefixes.kept_prefix import prefix_length
from ..past import IDS, MASK, PRESENT, following, prompt

STEPS = 8  # of one token each
PRESENTS = "keys and values"  # of all layers


def stepwise(model: nn.Module, data: Iterable[Any]) -> Iterator[dict[str, Tensor]]:
    """Yield the calls of each batch: one with a past of half the tokens, then as in generation.

    The keys and values, and the tokens that are added, are those of the model.
    """
    for batch in data:
        call = prompt(batch, model)
        half = call[IDS].shape[1] // 2
        if half:
            first = {name: x[:, :half] for name, x in call.items()}
            later = following(first, model(**first), call[IDS][:, half:])
            yield {**later, MASK: call[MASK], **{n: call[n][:, half:] for n in call if n != MASK}}
        yield call
        for _ in range(_room(model, call)):
            outputs = model(**call)
            call = following(call, outputs, outputs["logits"][:, -1:].argmax(-1))
            yield call


def compared(call: Mapping[str, Tensor], outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the logits of tokens that are no padding, and the keys and values of all as one."""
    tokens = call[MASK].bool()
    presents = [x for name, x in outputs.items() if name.startswith(PRESENT)]
    kept = torch.cat([x.transpose(1, 2)[tokens].flatten() for x in presents])
    others = {name: x for name, x in outputs.items() if not name.startswith(PRESENT)}
    logits = outputs["logits"][tokens[:, -call[IDS].shape[1] :]]
    return {**others, "logits": logits, PRESENTS: kept}


def _room(model: nn.Module, call: dict[str, Tensor]) -> int:
    """Return how many tokens to add: a few, or as many as the model takes."""
    config: Any = model.config
    longest = getattr(config.get_text_config(decoder=True), "max_position_embeddings", 1 << 30)
    return max(0, min(STEPS, longest - prefix_length(model) - call[MASK].shape[1]))
