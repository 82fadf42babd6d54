"""Words and numbers that sections of an analysis share."""

from collections.abc import Mapping
from typing import Any

Data = Mapping[str, Any]

NAMES = {
    "input": "inputs of Linear",
    "convolution": "inputs of convolutions",
    "output": "outputs of Linear",  # and of convolutions
    "norm": "outputs of LayerNorm",
    "residual": "residual sums",
    "operand": "operands of attention",
    "score": "attention scores",
    "probability": "softmax outputs",
}


def percent(share: float) -> str:
    """Write a share of one as a percentage."""
    return f"{100 * share:.3g}\N{NO-BREAK SPACE}%"


def number(value: float) -> str:
    """Write a number with four digits."""
    return f"{value:.4g}"
