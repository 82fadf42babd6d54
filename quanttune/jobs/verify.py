"""Compare an ONNX file with the folder it was made from. What `quanttune verify` does."""

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..deploy.encoder_decoder import has_two_parts
from ..deploy.generation import computed_by
from ..deploy.onnx_model import OnnxModel
from ..deploy.past import positions
from ..deploy.verification.result import Verification
from ..deploy.verification.simulated_codes import perturbed
from ..deploy.verification.verify import verify as verify_outputs
from ..progress import Progress, silent, track
from .dataset import load_dataset
from .export import example, load_calibrated
from .metrics import LAST_WORDS, choose, measure
from .settings import Settings


def verify(
    settings: Settings,
    onnx: Path,
    *,
    metrics: Sequence[str] = (),
    limit: int | None = None,
    tolerance: float = 1.0,
    say: Callable[[str], None] = print,
    progress: Progress = silent,
) -> tuple[Verification, dict[str, Any]]:
    """Compare a file with the quantized model of a folder: its layers on the first batch, and how
    it is measured on all rows. Of an encoder-decoder the file is the folder of both.

    Without data the layers are compared on two rows that are made up, and nothing is measured.

    Args:
        metrics, limit: as in `evaluate`.
        tolerance: how far the file's number may be from the simulation's, in per cent points; of a
            perplexity in per cent. Or twice as far as the noise moves the simulation's, if that is
            more.

    Returns:
        What the layers are like, and all numbers, with the problems of both.

    Raises:
        ValueError: there is nothing to compare; it says why.
    """
    began = time.monotonic()
    source, model = load_calibrated(settings)
    facts: dict[str, Any] = {"task": source.task, "model": source.origin, "rows": None}
    if not settings.data:
        found = verify_outputs(onnx, model, [example(source)])
        return found, {**facts, "measured": None, **found.as_dict()}
    names = choose(source.task, settings.subset, metrics, getattr(source.config, "num_labels", 0))
    inputs = load_dataset(settings, limit=limit, last_words=names[0] in LAST_WORDS)
    for line in inputs.said:
        say(line)
    taken = () if has_two_parts(model) else OnnxModel(onnx).inputs

    def batches(what: str) -> Iterator[dict[str, Tensor]]:
        rows = track(inputs.batches(settings, model), what, progress)
        return (completed(batch, taken) for batch in rows)

    first = next(batches("comparing layers"))
    del first["labels"]
    found = verify_outputs(onnx, model, [first])

    def measured(name: str, which: Any) -> dict[str, float]:
        return measure(names, which, batches(f"measuring {name}"), inputs.processor)

    numbers = {"simulation": measured("the simulation", model)}
    with answering(onnx, model) as file:
        numbers["file"] = measured("the file", file)
    with perturbed(model, settings.seed, found.layers):
        numbers["noise"] = measured("the simulation with noise", model)
    found = replace(found, problems=(*found.problems, *too_far(numbers, tolerance)))
    seconds = round(time.monotonic() - began, 1)
    facts |= {"rows": len(inputs.rows), **inputs.facts, "measured": numbers, "seconds": seconds}
    return found, {**facts, **found.as_dict()}


@contextmanager
def answering(onnx: Path, model: Any) -> Iterator[Any]:
    """Yield what answers as a file does where the model would."""
    threads = torch.get_num_threads()
    if has_two_parts(model):
        with computed_by(onnx, model, threads):
            yield model
    else:
        file = OnnxModel(onnx, threads=threads)
        yield lambda **batch: SimpleNamespace(**file(**batch))


def completed(batch: dict[str, Tensor], names: Collection[str]) -> dict[str, Tensor]:
    """Add what a file takes and rows of joined texts lack: all their tokens count, as of one."""
    ids = batch.get("input_ids")
    for name, value in (("attention_mask", 1), ("token_type_ids", 0)):
        if ids is not None and name in names and name not in batch:
            batch[name] = torch.full_like(ids, value)
    if "position_ids" in names and "position_ids" not in batch:
        batch["position_ids"] = positions(batch["attention_mask"])
    return batch


def too_far(numbers: Mapping[str, Mapping[str, float]], tolerance: float) -> Iterator[str]:
    """Say of each metric whose file is farther from the simulation than `verify` allows."""
    for name, simulated in numbers["simulation"].items():
        allowed = tolerance * simulated / 100 if name == "perplexity" else tolerance
        allowed = max(allowed, 2 * abs(numbers["noise"][name] - simulated))
        if not abs(numbers["file"][name] - simulated) <= allowed:
            yield (
                f"{name}: {numbers['file'][name]:.6g} of the file, {simulated:.6g} of the "
                f"simulation, more than {allowed:.3g} apart"
            )
