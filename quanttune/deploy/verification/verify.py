"""Check that an ONNX file computes what the quantized model simulates."""

from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...quantization.running import evaluating
from ..caches import without_caches
from ..onnx_model import read
from ..past import has_past, with_past
from ..requirements import check_model
from .identity import check_description
from .result import Verification
from .steps import stepwise


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
    check_model(model)
    file = read(path)
    check_description(model, file, path)
    from .comparison import compare  # needs onnx

    with evaluating(model), without_caches(model), torch.no_grad(), ExitStack() as undo:
        if has_past([value.name for value in file.graph.input]):
            undo.enter_context(with_past(model))
            data = stepwise(model, data)
        return Verification(type(model).__name__, **compare(path, file, model, data))
