"""Quantize a model with the ranges of a dataset. What `quanttune calibrate` does."""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import nn

from ..progress import Progress, silent
from ..quantization.prefixes.kept_prefix import prefix_of
from ..quantization.prefixes.prefix import prefix as keep_prefix
from ..quantization.saving.description import describe
from ..quantization.scheme import DYNAMIC
from ..quantization.simulation import quantize
from ..quantization.summary import summary
from .dataset import load_dataset
from .models import longest
from .publication import check_empty, publish, reserved
from .settings import Settings


def calibrate(
    settings: Settings,
    quantization: Mapping[str, Any],
    out: Path,
    *,
    limit: int | None = None,
    prefix: str | Sequence[int] | None = None,
    dry_run: bool = False,
    say: Callable[[str], None] = print,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Quantize a model with the ranges of a dataset, write it to the folder `out`, and say how.

    `from_pretrained` loads the folder once quanttune.quantization.pretrained is imported, and
    `evaluate` as it is.

    Args:
        quantization: arguments of `quanttune.quantize` other than `data`.
        limit: rows to take ranges from, drawn by the seed.
        prefix: token ids that the model keeps (`quanttune.prefix`); "data" chooses them, "bos" is
            the one that begins texts.
        dry_run: load and quantize, and stop before anything is written.

    Raises:
        ValueError: an argument, the data or the folder does not fit; it says what would.
    """
    if dry_run:
        check_empty(out)
    with nullcontext() if dry_run else reserved(out):
        folder = None if dry_run else out
        found = _calibrate(settings, quantization, folder, limit, prefix, say, progress)
    return {"out": str(out), **found}


def _calibrate(
    settings: Settings,
    quantization: Mapping[str, Any],
    out: Path | None,
    limit: int | None,
    prefix: str | Sequence[int] | None,
    say: Callable[[str], None],
    progress: Progress,
) -> dict[str, Any]:
    inputs = load_dataset(settings, limit=limit)
    for line in inputs.said:
        say(line)
    model = inputs.load_float(settings.seed)
    if prefix is not None:
        _keep_prefix(model, prefix, inputs.batches(settings, model))
        lengths = [batch["input_ids"].shape[1] for batch in inputs.batches(settings, model)]
        _check_room(model, max(lengths), inputs.processor)
        say(f"prefix: {_words(model, inputs.processor)}")
    dynamic = quantization.get("calibrator") == DYNAMIC
    if quantization.get("overrides"):
        _check_overrides(model, inputs.batches(settings, model), quantization)
    wanted = not dynamic or quantization.get("methods")
    batches = inputs.batches(settings, model) if wanted else None
    quantize(model, data=batches, progress=progress, **quantization)
    scheme, sites = describe(model)["scheme"], summary(model)
    rows = len(inputs.rows) if wanted else 0
    ranges = f"ranges of {0 if dynamic else rows} rows"
    said = [f"{len(sites.sites)} quantizers", ranges, *scheme["methods"]]
    say(f"{inputs.task}: {type(model).__name__}, {', '.join(said)}")
    if out:
        publish(model.cpu(), inputs.processor, out)
    facts = {"task": inputs.task, "rows": rows, **inputs.facts, "quantization": scheme}
    return {**facts, "summary": sites.as_dict()}


def _keep_prefix(model: nn.Module, prefix: str | Sequence[int], batches: Iterable[Any]) -> None:
    if prefix == "data":
        keep_prefix(model, data=batches)
    elif isinstance(prefix, str):
        keep_prefix(model)
    else:
        keep_prefix(model, prefix)


def _check_room(model: Any, tokens: int, tokenizer: Any) -> None:
    """Refuse rows for whose last tokens the model has no positions behind its prefix."""
    kept: Any = prefix_of(model)
    room = longest(model.config, tokenizer) - len(kept)
    if tokens > room:
        raise ValueError(
            f"behind a prefix of {len(kept)} tokens the model takes {room}, and a row has "
            f"{tokens}: give --tokens {room}"
        )


def _words(model: nn.Module, tokenizer: Any) -> str:
    """Return the ids of a model's prefix, and the text that they are."""
    kept: Any = prefix_of(model)
    ids = kept.tokens.tolist()
    return f"{', '.join(map(str, ids))} ({tokenizer.decode(ids)!r})"


def _check_overrides(
    model: nn.Module, batches: Iterable[Any], quantization: Mapping[str, Any]
) -> None:
    """Refuse patterns that match nothing before the long work: by one batch, on a copy."""
    trial = {**quantization, "calibrator": "minmax", "methods": (), "symmetric": True}
    quantize(copy.deepcopy(model), data=[next(iter(batches))], **trial)
