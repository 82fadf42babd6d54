"""Run a model over batches of data, for its hooks."""

from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..masks import Mask
from ..progress import Progress, silent, track
from .quantizer import WeightQuantizer
from .state import quantizers, state_of
from .token_mask import counting


@dataclass(frozen=True)
class Data:
    """What a model is run on for its ranges, and for what methods want to know.

    batches: iterated as often as needed. mask: which tokens are padding, as in `quantize`.
    progress: is told how far a pass has come.
    """

    batches: Iterable[Any]
    mask: Mask | None = "attention_mask"
    progress: Progress = silent

    def track(self, what: str | None) -> Iterable[Any]:
        """Return the batches, of which `progress` is told under a name, if there is one."""
        return self.batches if what is None else track(self.batches, what, self.progress)


class StopForward(Exception):
    """Raised by a hook that needs no more of the forward that is under way."""


def forward_batch(model: nn.Module, batch: Any, mask: Mask | None = "attention_mask") -> Any:
    """Call a model with a batch, whose padding is known meanwhile."""
    with counting(model, batch, mask) as (args, kwargs):
        return model(*args, **kwargs)


@torch.no_grad()
def forward_batches(
    model: nn.Module, data: Iterable[Any], mask: Mask | None = "attention_mask"
) -> int:
    """Run a model over batches in evaluation mode, for its hooks; return how many there were."""
    batches = 0
    with evaluating(model):
        for batch in data:
            with suppress(StopForward):
                forward_batch(model, batch, mask)
            batches += 1
    return batches


def main_output(output: Any) -> Tensor:
    """Return what a model is asked for: its logits, its last hidden state, or what comes first."""
    if isinstance(output, Tensor):
        return output
    for name in ("logits", "last_hidden_state"):
        if isinstance(value := getattr(output, name, None), Tensor):
            return value
    first: Tensor = output[0]
    return first


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and afterwards each module into the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, was_training in modes:  # from the outside in: train() reaches what is inside
            if module.training != was_training:
                module.train(was_training)


@contextmanager
def requiring_gradients(
    parameters: Iterable[nn.Parameter], required: bool = True
) -> Iterator[None]:
    """Let parameters require gradients, or none, and afterwards what they did."""
    with ExitStack() as undo:
        for parameter in parameters:
            undo.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(required)
        yield


@contextmanager
def rounding_only(
    model: nn.Module, activations: Collection[str] = (), weights: bool = False
) -> Iterator[None]:
    """Let the quantizers of a model pass what they are given, but for those named, and weights if
    they are to be rounded.
    """
    passing = [q for name, q in quantizers(model).items() if name not in activations]
    with ExitStack() as undo:
        if not weights:
            undo.callback(_enable_weights, model, True)  # also those that are found meanwhile
            _enable_weights(model, False)
        for quantizer in passing:
            undo.callback(setattr, quantizer, "enabled", quantizer.enabled)
            quantizer.enabled = False
        yield


def _enable_weights(model: nn.Module, enabled: bool) -> None:
    state_of(model).round_weights = enabled
    for quantizer in model.modules():
        if isinstance(quantizer, WeightQuantizer):
            quantizer.enabled = enabled


@contextmanager
def in_float(model: nn.Module) -> Iterator[None]:
    """Let a quantized model compute in float."""
    sites = state_of(model)  # not its quantizers: a dynamic model may not have made all of them
    with rounding_only(model):
        sites.enabled = False
        try:
            yield
        finally:
            sites.enabled = True
