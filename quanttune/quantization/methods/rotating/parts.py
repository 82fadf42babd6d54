"""What modules do to features: write them, or read them."""

from typing import Any

from torch import nn

from ..equalizing.readers import can_read

CONVOLUTIONS = nn.Conv1d, nn.Conv2d, nn.Conv3d


def can_write(module: Any) -> bool:
    """Tell whether each feature of a module's output has weights of its own."""
    if isinstance(module, CONVOLUTIONS):
        return module.groups == 1
    if isinstance(module, nn.Embedding):
        return module.max_norm is None
    return can_read(module)
