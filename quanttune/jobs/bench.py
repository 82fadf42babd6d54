"""Time a quantized model's ONNX file beside the float model's. What `quanttune bench` does."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from ..deploy.external_data import size_of
from ..deploy.float_export import export_float
from ..deploy.latency import compare
from ..deploy.onnx_model import has_vnni, read
from ..deploy.past import has_past
from ..deploy.verification.answers import check_answers
from ..deploy.verification.identity import check_description
from ..environment import environment
from ..progress import Progress, silent
from . import models
from .export import dimensions, example, load_calibrated
from .models import ModelSource
from .settings import Settings

SECONDS = 10.0  # of turns per number of threads, where seven rounds do not take longer


def bench(
    settings: Settings,
    file: Path,
    *,
    threads: Sequence[int] = (1, 2),
    progress: Progress = silent,
) -> dict[str, Any]:
    """Time what `quanttune export` wrote in ONNX Runtime, beside the folder's weights in float.

    Both take turns on the same random rows, `settings.batch_size` at a time, texts of
    `settings.tokens` tokens without padding. The float file is what torch.onnx makes of the model.
    The answers of both are checked first.

    Raises:
        ValueError: the file is of another model or computes something else, or an argument does
            not fit. FileNotFoundError: there is no file.
    """
    if wrong := [count for count in threads if count < 1]:
        raise ValueError(f"threads must be 1 or more, got {wrong[0]}")
    source, quantized = load_calibrated(settings)
    graph = read(file)
    check_description(quantized, graph, file)
    if has_past([value.name for value in graph.graph.input]):
        raise ValueError(
            f"bench times one call without keys and values, which {file} takes: export it without "
            "--with-past"
        )
    steps = 2 + len(threads)
    with TemporaryDirectory() as folder:
        files = {"float": Path(folder) / "float.onnx", "integer": file}
        progress("exporting the float model", 0, steps)
        model, rows = source.load(settings.seed, quantized=False).cpu(), example(source)
        opset = next(entry.version for entry in graph.opset_import if not entry.domain)
        export_float(model, rows, files["float"], opset=opset, dynamic=dimensions(source))
        batch = _batch(rows, model, settings.batch_size, _tokens(source, settings), settings.seed)
        progress("checking the answers", 1, steps)
        check_answers(files["float"], file, model, quantized, batch)
        latency = {}
        for i, count in enumerate(threads):
            progress(f"timing, {count} thread{'s' * (count > 1)}", 2 + i, steps)
            latency[count] = _latency(files, batch, count)
        progress("timing", steps, steps)
        sizes = {name: size_of(path) for name, path in files.items()}
    facts = environment()
    return {
        "file": str(file),
        "task": source.task,
        "model": source.origin,
        "inputs": {name: list(x.shape) for name, x in batch.items()},
        "latency": latency,
        "bytes": {**sizes, "ratio": sizes["integer"] / sizes["float"]},
        "environment": {**facts, "vnni": has_vnni()},
    }


def _tokens(source: ModelSource, settings: Settings) -> int:
    if source.task == "image-classification":
        return 0
    processor = models.load_processor(source.name, source.task)
    return min(settings.tokens, models.longest(source.config, processor))


def _batch(
    rows: Mapping[str, Tensor], model: nn.Module, count: int, tokens: int, seed: int
) -> dict[str, Tensor]:
    """Return random rows like those of an example, whose last one has no padding."""
    generator = torch.Generator().manual_seed(seed)
    batch = {}
    for name, x in rows.items():
        if x.is_floating_point():
            batch[name] = torch.randn(count, *x.shape[1:], generator=generator)
        elif name == "input_ids":
            words = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
            batch[name] = torch.randint(words, (count, tokens), generator=generator)
        else:
            batch[name] = x[-1, -1].repeat(count, tokens)
    return batch


def _latency(
    files: Mapping[str, Path], batch: Mapping[str, Tensor], threads: int
) -> dict[str, dict[str, Any]]:
    rows = len(next(iter(batch.values())))
    return {
        name: {**asdict(timing), "rows_per_second": 1e3 * rows / timing.milliseconds}
        for name, timing in compare(files, batch, threads, SECONDS).items()
    }
