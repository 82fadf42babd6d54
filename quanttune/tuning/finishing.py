"""The last steps of a tuning, rounded: at a width that changes from step to step."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from torch import nn

from ..fake_quantizer import integer_range
from ..quantization.convert import convert
from ..quantization.placement import check_devices
from ..quantization.quantizer import ActivationQuantizer, WeightQuantizer
from ..quantization.scheme import DYNAMIC, Scheme
from .hooks import Hook

BITS = (16, 8, 6)  # with one width only, the model would learn the codes of one grid by heart


class Finishing:
    """A model that rounds while it trains, from `begin` to `end`; in evaluation it is float.

    Everything is rounded that `quantize` would round, to grids that follow each tensor's largest
    magnitude, which gets the gradient of the grid: without that much of what is won here is lost.
    The parameters are the same objects all along, and nothing enters the state_dict.
    """

    def __init__(self, model: nn.Module, bits: Sequence[int], steps: int) -> None:
        self.steps = steps
        self._model, self._bits = model, tuple(bits)
        self._undo: ExitStack | None = None

    @property
    def is_begun(self) -> bool:
        return self._undo is not None

    def begin(self) -> None:
        """Let the model round.

        Raises:
            ValueError: see `quantize`.
        """
        check_devices(self._model)
        with ExitStack() as undo:
            scheme = Scheme(self._bits[0], calibrator=DYNAMIC, range_gradient=True)
            self._sites = convert(self._model, scheme, undo)
            enter, leave = Hook(self._enter), Hook(self._leave)
            for handle in (
                self._model.register_forward_pre_hook(enter, prepend=True),
                self._model.register_forward_hook(leave, always_call=True),
            ):
                undo.callback(handle.remove)
            self._undo = undo.pop_all()

    def round_to(self, step: int) -> None:
        """Take the width of a step; they take turns, so that a step is enough to go on from.

        The weights stay what they are until the next call, and are rounded once.
        """
        bits = self._bits[step % len(self._bits)]
        self._sites.scheme = replace(self._sites.scheme, bits=bits)
        for quantizer in self._quantizers():
            quantizer.bits = bits
            if isinstance(quantizer, WeightQuantizer):
                quantizer.hold()

    def end(self) -> None:
        """Make the model the float one that it was, with the parameters that it has by now."""
        if self._undo:
            self._undo.close()
            self._undo = None

    def _enter(self, model: nn.Module, args: Any) -> None:
        self._sites.enabled = self._sites.round_weights = model.training
        for quantizer in self._quantizers():
            quantizer.enabled = model.training

    def _leave(self, model: nn.Module, args: Any, output: Any) -> None:
        """Keep numbers without a meaning, of quantizers that a forward made, out of state_dict."""
        for quantizer in self._quantizers():
            for name, buffer in quantizer.named_buffers():
                quantizer.register_buffer(name, buffer, persistent=False)

    def _quantizers(self) -> Iterator[ActivationQuantizer | WeightQuantizer]:
        for module in self._model.modules():
            if isinstance(module, ActivationQuantizer | WeightQuantizer):
                yield module


def check_finish(bits: Sequence[int], steps: int, total_steps: int | None) -> None:
    """Raise a ValueError that says what is wrong with how a tuning is to finish."""
    if steps < 0 or (steps and (total_steps is None or steps > total_steps)):
        raise ValueError(f"finish_steps must be from 0 to total_steps, {total_steps}, got {steps}")
    if not bits:
        raise ValueError("finish_bits must hold a width, such as 8")
    for width in bits:
        integer_range(width)
