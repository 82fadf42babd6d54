"""What is analysed, and what is asked about it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..quantization.calibrators import CALIBRATORS
from .sweep import THRESHOLDS


@dataclass(frozen=True)
class Subject:
    """A float model, its data and how to tell that it is good.

    Args:
        name: what to call it; `facts` are what else to tell about model and data.
        model: it is copied, and not changed.
        data: batches that ranges and statistics are taken from, as `quantize` takes them.
        metric: the name of what `evaluate` returns, such as "accuracy"; higher is better.
        tokenizer: names the outlier tokens, from the `input_ids` of the batches.
    """

    name: str
    model: nn.Module
    data: Sequence[Any]
    metric: str
    evaluate: Callable[[nn.Module], float]
    tokenizer: Any = None
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """What to find out.

    Args:
        bits, coverage: as in `quantize`.
        thresholds: of the saturation sweep: per cent of the magnitudes that stay untouched.
        calibrators: names in CALIBRATORS.
        sites: whose channels are drawn; by default the last residual sum, and the widest.
    """

    bits: int = 8
    coverage: str = "full_no_softmax"
    thresholds: Sequence[float] = THRESHOLDS
    calibrators: Sequence[str] = tuple(CALIBRATORS)
    sites: Sequence[str] = ()

    @property
    def scheme(self) -> dict[str, Any]:
        """The arguments of `quantize` that every trial shares."""
        return {"bits": self.bits, "coverage": self.coverage}
