"""Keep a prefix in front of every sequence: there a language model puts its largest values."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from ...transaction import transaction
from ..state import refuse_quantized
from .choice import choose
from .decoder import check_answers, decoder_of, keep
from .kept_prefix import drop_prefix, prefix_of

PREFIXES = ("data", "bos")  # that verbs can be asked for beside token ids


def prefix(
    model: nn.Module,
    token_ids: Sequence[int] | None = None,
    *,
    data: Iterable[Any] | None = None,
) -> nn.Module:
    """Let a decoder find the keys and values of a prefix before every sequence, and return it.

    The first token of a sequence often holds activations thousands of times the median, which one
    scale per tensor has to cover. Behind a prefix no token is the first: what the prefix's own
    tokens hold is computed once, here, in float, and only their keys and values stay. Ranges that
    `quantize` then takes are without them. The model answers as it does to [prefix, tokens]; it
    holds as many tokens less, and each step attends to the prefix, too. `quanttune.save`,
    `save_pretrained` and `export_onnx` keep it.

    Call it before `quantize`, and after the weights were changed by training. A prefix that the
    model has already is replaced.

    Args:
        model: a causal language model of transformers whose layers all attend to all tokens.
        token_ids: the prefix. By default the one that `data` asks for, or the token that begins
            texts (bos_token_id).
        data: batches as for `quantize`, of which the first is looked at: tokens that hold the
            largest values are tried, and taken as long as another one narrows the ranges.

    Raises:
        ValueError: the model is quantized, no such decoder, or answers otherwise than to [prefix,
            tokens]; or an id is none of its tokens, or there is none to begin with.
    """
    refuse_quantized(model)
    decoder = decoder_of(model)
    if token_ids is not None and data is not None:
        raise ValueError("prefix takes token_ids, or data that choose them: got both")
    known = None if data is not None else _checked(token_ids, decoder.config)
    before: Any = prefix_of(model)
    with transaction(model) as undo:  # an error leaves the model with what it had
        drop_prefix(model)
        if before is not None:
            undo.callback(before.attach, decoder)
        undo.callback(drop_prefix, model)
        ids = choose(decoder, model, data or ()) if known is None else known
        keep(decoder, ids)
        check_answers(model)
    return model


def _checked(token_ids: Sequence[int] | None, config: Any) -> list[int]:
    """Return the ids of a prefix, or the one that begins texts."""
    if token_ids is None:
        token_ids = [] if config.bos_token_id is None else [config.bos_token_id]
    ids = list(token_ids)
    if not ids:
        raise ValueError("a prefix needs token_ids or data: the model has no bos_token_id")
    if wrong := [x for x in ids if type(x) is not int or not 0 <= x < config.vocab_size]:
        raise ValueError(
            f"token_ids must be whole numbers from 0 to {config.vocab_size - 1}, got {wrong[0]!r}"
        )
    return ids
