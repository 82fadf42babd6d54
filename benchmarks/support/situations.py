"""One model of the support matrix, quantized in one situation of a batch and used in another.

A sample's answer must not depend on what else is in the batch, on how many samples the model was
calibrated with, or on the length. In float64 an answer alone and in a batch differ by rounding of
1e-16, which does not move a code; models that compute in float32 only may have a code moved.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import quanttune as qt
from benchmarks.support.check import MISFIT, _first_that_runs, _message, _NotRunError
from benchmarks.support.models import WORDS
from quanttune.quantization.running import main_output

Inputs = dict[str, Tensor]
LIMIT = 1e-5  # of the largest number of an answer
PADDED = 3  # tokens
TEXT = ("input_ids", "decoder_input_ids")


def examine(library: str, name: str) -> dict[str, Any]:
    """Return how a model fared in each situation, and how much of it is integers."""
    row: dict[str, Any] = {}
    try:
        model, inputs = _first_that_runs(library, name, row)
    except _NotRunError as error:
        return {"message": str(error)}
    model.eval()
    found = {name: _outcome(model, inputs, make) for name, make in _MAKERS.items()}
    return row | {"situations": found, **_integers(model, inputs)}


def _padded(on_the_left: bool) -> Callable[[Inputs], tuple[Inputs, Inputs] | None]:
    def make(inputs: Inputs) -> tuple[Inputs, Inputs] | None:
        if "input_ids" not in inputs:
            return None
        mask = torch.ones_like(inputs["input_ids"])
        mask[0, slice(None, PADDED) if on_the_left else slice(-PADDED, None)] = 0
        both = inputs | {"attention_mask": mask}
        return both, both

    return make


def _longer(inputs: Inputs) -> tuple[Inputs, Inputs] | None:
    if not any(name in inputs for name in TEXT):
        return None
    words = {k: v for k, v in inputs.items() if k in TEXT}
    sizes = {k: (len(v), v.shape[1] * 3 // 2) for k, v in words.items()}
    return inputs, inputs | {k: torch.randint(2, WORDS, size) for k, size in sizes.items()}


_MAKERS: dict[str, Callable[[Inputs], tuple[Inputs, Inputs] | None]] = {
    "left": _padded(True),
    "right": _padded(False),
    "one after many": lambda inputs: (inputs, inputs),
    "many after one": lambda inputs: (_sample(inputs, 0), inputs),
    "longer": _longer,
}


def _sample(inputs: Inputs, i: int) -> Inputs:
    return {k: v[i : i + 1] for k, v in inputs.items()}


def _outcome(model: nn.Module, inputs: Inputs, make: Any) -> str:
    made = make(inputs)
    if made is None:
        return ""
    calibration, use = made
    try:
        with torch.no_grad():
            if difference := _difference(model, use):
                return f"not asked: {difference} in float"
    except MISFIT as error:
        return f"not asked: {_message(error)} in float"
    try:
        quantized = qt.quantize(copy.deepcopy(model), 8, data=[calibration])
    except (ValueError, TypeError) as error:
        return f"refused: {_message(error)}"
    except MISFIT as error:
        return f"error: {_message(error)}"
    try:
        with torch.no_grad():
            return _difference(quantized, use) or "equal"
    except MISFIT as error:
        return f"error: {_message(error)}"


def _difference(model: nn.Module, inputs: Inputs) -> str:
    """Tell how far the answers of samples alone are from those in a batch; "" if they are equal."""
    whole = main_output(model(**inputs))
    samples = len(next(iter(inputs.values())))
    if not whole.isfinite().all():
        return "an answer is not finite"
    if whole.dim() == 0 or len(whole) % samples:
        return "an answer is not one of each sample"
    alone = torch.cat([main_output(model(**_sample(inputs, i))) for i in range(samples)])
    if alone.shape != whole.shape:
        return "an answer has another shape"
    error = (alone - whole).abs().max().item() / max(whole.abs().max().item(), 1e-30)
    return f"differs by {error:.1e}" if error > LIMIT else ""


def _integers(model: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """Return the shares of integers, and what is named as float."""
    try:
        summary = qt.summary(qt.quantize(model, 8, coverage="full", data=[inputs]))
    except MISFIT as error:
        return {"integers": _message(error)}
    products = None if summary.integer_products is None else round(summary.integer_products, 4)
    unasked = [f"{one.name}: {one.reason}" for one in summary.floats if not one.is_asked_for]
    return {
        "integers": [round(summary.integer_parameters, 4), products],
        "float": unasked[:4],
    }
