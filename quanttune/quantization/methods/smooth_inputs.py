"""Smoothing of the inputs that no LayerNorm gives, by a multiplication of its own."""

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from ...progress import track
from ..restoration import add_smoothing
from ..running import Data, forward_batches
from ..scheme import Scheme
from .equalizing.channel_factors import SMALLEST, Channels
from .equalizing.pairs import columns_of
from .equalizing.readers import find_other_readers
from .method import Equalization


@dataclass(frozen=True)
class SmoothInputs(Equalization):
    """Divide channel c of other inputs by max|x_c|^alpha / max|W_c|^(1 - alpha), explicitly.

    These are the inputs that equalizations of LayerNorms leave alone: of Linear modules behind an
    activation function, attention or an RMSNorm. Nothing absorbs their factors, so that every
    runtime multiplies once more for each. Combine it with one of those equalizations.

    Args:
        alpha: from 0 (weights become even) to 1 (activations do). 0.8 was chosen on MiniLM: what
            leaves a GELU has channels that differ more than those of a LayerNorm.

    Source: Xiao et al., SmoothQuant, arXiv 2211.10438, eq. 4. NNCF multiplies so as well.
    """

    name: ClassVar[str] = "smooth_inputs"
    alpha: float = 0.8

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be from 0 to 1, got {self.alpha}")

    @torch.no_grad()
    def apply(self, model: nn.Module, scheme: Scheme, data: Data) -> None:
        modules = find_other_readers(model, data)
        seen = {name: Channels(most=0) for name in modules}
        with ExitStack() as undo:
            for name, module in modules.items():
                undo.callback(module.register_forward_pre_hook(seen[name].see).remove)
            forward_batches(model, data.track(f"{self.name}: ranges"), data.mask)
        for name in track(list(modules), self.name, data.progress):
            if not seen[name].absmax.isfinite().all():
                raise ValueError(f"{name} got NaN, inf or nothing during calibration")
            self._smooth(modules[name], seen[name])

    def _smooth(self, module: Any, channels: Channels) -> None:
        columns = columns_of(module)
        weights = columns.abs().amax(0).to(channels.absmax).clamp_min(SMALLEST)
        scale = channels.absmax**self.alpha / weights ** (1 - self.alpha)
        # both sides must know the same factors, in a model of half precision too
        scale = scale.clamp_min(SMALLEST).float().to(columns.dtype)
        columns.mul_(scale)
        add_smoothing(module, scale.float())
