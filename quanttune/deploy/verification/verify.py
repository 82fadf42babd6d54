"""Check that an ONNX file computes what the quantized model simulates."""

from collections.abc import Iterable
from contextlib import ExitStack
from itertools import tee
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...quantization.caches import without_caches
from ...quantization.running import evaluating
from ...transaction import transaction
from ..encoder_decoder import has_two_parts
from ..onnx_model import read
from ..parts import DECODER_ONLY, Part, part_files
from ..past import has_past
from ..requirements import IN_ONNX, check_model
from .identity import check_description
from .result import Verification, joined
from .steps import calls_of


def verify(path: str | Path, model: nn.Module, data: Iterable[Any]) -> Verification:
    """Compare an ONNX file, run by ONNX Runtime on the CPU, with the model that it was made from.

    First what the file holds: scales, zero points and tensors must be the model's. Then layer by
    layer, on the first batch: the file is cut where it rounds, each part is given the codes of the
    simulation, and must make the codes of the simulation, but for values near the border of two.
    Such flips compound with depth, so the whole file is judged on all batches beside a control: the
    simulation with a little noise on everything that it rounds.

    A file with_past is called as a decoder is: with the second half of a batch behind the keys and
    values of the first, with all of it, and with a few tokens more, one by one, which are the
    simulation's greedy ones. Its keys and values are those of the simulation. What is said of the
    logits' argmax is the share of tokens, without padding, behind which the file chooses the same.

    Of an encoder-decoder's folder the encoder's file is compared first. The decoder's gets the
    simulation's states, and is called in the same way; the past has half of their keys at first.

    Args:
        path: what `export_onnx` wrote.
        model: what was exported, or the same one loaded again.
        data: batches of inputs, as `quantize` takes them. The codes of all sites for the first are
            held at once, a byte per value, twice.

    Raises:
        ValueError: there is nothing to compare: the file is not whole or of another model, the
            model is not ready for export, data is empty. What merely disagrees is in the result.
        FileNotFoundError: there is no file.
    """
    path = Path(path)
    check_model(model, IN_ONNX)
    if path.is_dir() and has_two_parts(model):
        copies = tee(data, 2)
        files = part_files(path).items()
        found = [_verify(file, model, one, p) for (p, file), one in zip(files, copies, strict=True)]
        return joined(found)
    return _verify(path, model, data)


def _verify(
    path: Path, model: nn.Module, data: Iterable[Any], part: Part | None = None
) -> Verification:
    """Verify one file; part: which of several of the model, else what its inputs tell."""
    file = read(path)
    check_description(model, file, path)
    if part is None and has_past([value.name for value in file.graph.input]):
        if has_two_parts(model):
            raise ValueError(f"{path} is one of two files: give their folder")
        part = DECODER_ONLY
    from .comparison import compare  # needs onnx

    with ExitStack() as undo:
        for context in (transaction(model), evaluating(model), without_caches(model)):
            undo.enter_context(context)
        undo.enter_context(torch.no_grad())
        if part:
            undo.enter_context(part.called(model))
            data = calls_of(part, model, data)
        return Verification(type(model).__name__, **compare(path, file, model, data))
