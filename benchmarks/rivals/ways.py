"""What a bench of other libraries knows of each way to quantize."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from benchmarks.rivals.rows import Embed, Rows

# what has to be rounded for a product or a sum to be one of integers; each row of a table by these
SCOPES = {
    "linear": "inputs of Linear modules",
    "attention": "also attention's products",
    "everything": "also residual sums",
}


@dataclass
class Built:
    """A quantized model: its embeddings, what it weighs, what its graph was seen to round."""

    embed: Embed
    megabytes: float | None = None  # None where the library only simulates
    rounded: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Way:
    """A setting of a library. What it rounds was read from the graph that it made."""

    library: str
    setting: str
    build: Callable[[Any, Rows], Built]  # of a float encoder that it may change
    scope: str
    activations: str  # "static, per tensor" or "dynamic, per token"
    zero_points: bool  # of activations
    weights: str = "per channel"
    bits: tuple[int, int] = (8, 8)  # of weights and of activations
    note: str = ""

    @property
    def name(self) -> str:
        return f"{self.library} {self.setting} W{self.bits[0]}A{self.bits[1]}"

    def facts(self) -> dict[str, Any]:
        return {
            "library": self.library,
            "setting": self.setting,
            "scope": self.scope,
            "activations": self.activations,
            "zero_points": self.zero_points,
            "weights": self.weights,
            "weight_bits": self.bits[0],
            "bits": self.bits[1],
            "note": self.note,
        }


def linears(model: Any) -> Iterator[tuple[str, Any]]:
    """Yield the Linear modules of an encoder by name."""
    from torch import nn

    return ((n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear))
