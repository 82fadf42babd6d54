"""Time a quantized model's ONNX file beside the float model's. What `quanttune bench` does."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from ..deploy.encoder_decoder import decoder_step, encoder_call, has_two_parts
from ..deploy.external_data import size_of
from ..deploy.float_export import export_float
from ..deploy.latency import compare
from ..deploy.onnx_model import has_vnni, read
from ..deploy.parts import DECODER, ENCODER, Part, part_files
from ..deploy.past import has_past
from ..deploy.verification.answers import check_float, check_integer
from ..deploy.verification.identity import check_description
from ..environment import environment
from ..progress import Progress, silent
from . import models
from .export import dimensions, example, load_calibrated
from .models import ModelSource
from .settings import Settings

_NAMES = {ENCODER: "encoder", DECODER: "decoder, a step"}
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
    The answers of both are checked first. Of an encoder-decoder, whose file is a folder, the
    encoder is timed, and the step that adds a token to as many as the encoder reads.

    Returns:
        Times, sizes and inputs; of an encoder-decoder by part, under "parts".

    Raises:
        ValueError: the file is of another model or computes something else, or an argument does
            not fit. FileNotFoundError: there is no file.
    """
    if wrong := [count for count in threads if count < 1]:
        raise ValueError(f"threads must be 1 or more, got {wrong[0]}")
    source, quantized = load_calibrated(settings)
    files = part_files(file) if has_two_parts(quantized) else {None: file}
    opset = min(_opset(one, quantized, part) for part, one in files.items())
    model, rows = source.load(settings.seed, quantized=False).cpu(), example(source)
    batch = _batch(rows, model, settings.batch_size, _tokens(source, settings), settings.seed)
    steps, told = 1 + len(files) * (1 + len(threads)), count()

    def tell(what: str) -> None:
        progress(what, next(told), steps)

    tell("checking the answers")
    check_integer(file, quantized, batch)
    timed = {}
    for part, integer in files.items():
        with TemporaryDirectory() as folder:
            floating = Path(folder) / "float.onnx"
            tell("exporting the float model")
            export_float(model, rows, floating, opset=opset, dynamic=dimensions(source), part=part)
            call = _call(part, batch, model)
            check_float(floating, model, call, part)
            timed[part] = _timed({"float": floating, "integer": integer}, call, threads, tell)
    tell("timing")
    of_parts = {_NAMES[part]: one for part, one in timed.items() if part}
    return {
        "file": str(file),
        "task": source.task,
        "model": source.origin,
        **({"parts": of_parts} if of_parts else timed[None]),
        "environment": {**environment(), "vnni": has_vnni()},
    }


def _opset(file: Path, quantized: nn.Module, part: Part | None) -> int:
    """Return the version of a file's operators.

    Raises:
        ValueError: it is of another model, or not one that is timed.
    """
    graph = read(file)
    check_description(quantized, graph, file)
    if part is None and has_past([value.name for value in graph.graph.input]):
        raise ValueError(
            f"bench times one call without keys and values, which {file} takes: export it without "
            "--with-past"
        )
    return int(next(entry.version for entry in graph.opset_import if not entry.domain))


def _call(part: Part | None, batch: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return what is timed: a whole batch, what the encoder reads, or a step of the decoder."""
    if part is None:
        return batch
    return encoder_call(batch, model) if part is ENCODER else decoder_step(batch, model)


def _timed(
    files: Mapping[str, Path],
    call: dict[str, Tensor],
    threads: Sequence[int],
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """Return the latency of two files, and their sizes."""
    latency = {}
    for number in threads:
        tell(f"timing, {number} thread{'s' * (number > 1)}")
        latency[number] = _latency(files, call, number)
    sizes = {name: size_of(path) for name, path in files.items()}
    return {
        "inputs": {name: list(x.shape) for name, x in call.items()},
        "latency": latency,
        "bytes": {**sizes, "ratio": sizes["integer"] / sizes["float"]},
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
        elif name.endswith("input_ids"):
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
