"""Give a quantized model's folder another scheme. What `quanttune requantize` does."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..quantization.requantization import requantize as requantize_model
from ..quantization.saving.description import describe
from ..quantization.summary import summary
from .export import example, load_calibrated
from .models import load_processor
from .publication import publish, reserved
from .settings import Settings


def requantize(
    settings: Settings,
    changes: Mapping[str, Any],
    out: Path,
    *,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Requantize the model of a folder without data, and write it to the folder `out`.

    Of the settings the model and the task count.

    Args:
        changes: arguments of `quanttune.requantize` other than `example`, which two rows made here
            stand for.

    Raises:
        ValueError: the model is not quantized, or cannot be so without data.
    """
    with reserved(out):
        source, model = load_calibrated(settings)
        rows = example(source) if changes.get("power_of_two") else None
        requantize_model(model, example=rows, **changes)
        publish(model, load_processor(source.name, source.task), out)
    scheme, sites = describe(model)["scheme"], summary(model)
    say(f"{source.task}: {type(model).__name__}, {len(sites.sites)} quantizers, no data")
    facts = {"out": str(out), "task": source.task, "model": source.origin}
    return {**facts, "quantization": scheme, "summary": sites.as_dict()}
