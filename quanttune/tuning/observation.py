"""What is known of the tensors that a forward pass observes, while it is under way and after it."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from .. import ops
from ..losses import OutlierLoss
from ..origins import Source
from .layout import Padding
from .loss_weight import Upstream


@dataclass(eq=False)
class Observation:
    """One distinct tensor of a forward pass, and how many instances of eq. 2 it stands for."""

    site: str
    module: nn.Module
    samples: int
    recomputed: bool  # by a checkpoint, during backward
    graph: bool  # made with gradients; a reentrant checkpoint first runs its region without
    multiplicity: int = 1
    padding: Padding | None = None
    ranges: Tensor | None = None  # of what is no padding
    statistics: Tensor | None = None  # of each sample, without a graph; see ops.StatisticsGroup
    version: int = 0  # of the tensor's storage: a change in place makes another tensor of it
    awaits_gradient: bool = False
    source: Source | None = None  # of the mask that is for it; see Layout


@dataclass(eq=False)
class Forward:
    """What a forward pass observed. A chain, since torch.compile compiles anew for longer lists."""

    observations: list[Observation]
    before: "Forward | None"


@dataclass(eq=False)
class Context:
    """What the backward of an observed tensor asks for: its loss, and how much that weighs."""

    loss: OutlierLoss
    upstream: Upstream
    group: ops.StatisticsGroup | None = field(default=None)  # of the forward that is under way

    @property
    def kernels(self) -> Any:
        """The ops that take statistics, which are there at the end of the forward."""
        return ops if self.group is None else self.group
