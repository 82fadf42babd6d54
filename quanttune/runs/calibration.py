"""Quantize a model with the ranges of a dataset. What `quanttune calibrate` does."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..quantization.description import describe
from ..quantization.insertion import is_quantized
from ..quantization.scheme import DYNAMIC
from ..quantization.simulation import quantize
from ..quantization.summary import summary
from .folder import check_empty, publish
from .inputs import Progress, prepare, silent
from .settings import Settings


def calibrate(
    settings: Settings,
    quantization: Mapping[str, Any],
    out: Path,
    *,
    limit: int | None = None,
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
        dry_run: load and quantize, and stop before anything is written.

    Raises:
        ValueError: an argument, the data or the folder does not fit; it says what would.
    """
    check_empty(out)
    inputs = prepare(settings, limit=limit)
    for line in inputs.said:
        say(line)
    model = inputs.load(settings.seed)
    if is_quantized(model):
        raise ValueError(f"{settings.model} is quantized already: give the float model")
    dynamic = quantization.get("calibrator") == DYNAMIC
    batches = None if dynamic else inputs.batches(settings, model, "calibrating", progress)
    quantize(model, data=batches, **quantization)
    sites = summary(model)
    rows = 0 if dynamic else len(inputs.rows)
    said = f"{len(sites.sites)} quantizers, ranges of {rows} rows"
    say(f"{inputs.task}: {type(model).__name__}, {said}")
    if not dry_run:
        publish(model.cpu(), inputs.processor, out)
    scheme = describe(model)["scheme"]
    facts = {"task": inputs.task, "rows": rows, **inputs.facts, "quantization": scheme}
    return {"out": str(out), **facts, "summary": sites.as_dict()}
