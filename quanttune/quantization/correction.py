"""What Linear modules add in float to a product with a rounded weight: products of low rank."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .modules import CORRECTION, QuantizedLinear, QuantizedTransposed


class Correction(nn.Module):
    """Adds up @ down @ x to what a module returns, of the input x that it multiplies."""

    def __init__(self, down: Tensor, up: Tensor) -> None:
        super().__init__()
        self.down, self.up = nn.Parameter(down), nn.Parameter(up)  # (rank, inputs), (outputs, rank)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return y, a product with x, with what is added to it."""
        linear = torch.ops.aten.linear.default  # not F.linear, which the functional sites look at
        return torch.ops.aten.add.Tensor(y, linear(linear(x, self.down), self.up))  # type: ignore[no-any-return]


def add_correction(module: Any, down: Tensor, up: Tensor) -> None:
    """Let a quantized Linear or Conv1D add a product with up @ down, (outputs, inputs)."""
    # in rows, as a file holds them: of other strides a product may differ in its last bits
    held = (part.to(module.weight).contiguous() for part in (down, up))
    module.add_module(CORRECTION, Correction(*held))


def drop_corrections(model: nn.Module) -> None:
    """Take all corrections out of a model."""
    for name in corrections(model):
        delattr(model.get_submodule(name), CORRECTION)


def corrections(model: nn.Module) -> dict[str, Correction]:
    """Return the corrections of a model by the names of their modules."""
    found = {name: module._modules.get(CORRECTION) for name, module in model.named_modules()}
    return {name: one for name, one in found.items() if isinstance(one, Correction)}


def described_corrections(model: nn.Module) -> dict[str, Any]:
    """Return what a description says of corrections, their ranks: nothing, if there are none."""
    ranks = {name: len(one.down) for name, one in corrections(model).items()}
    return {"corrections": ranks} if ranks else {}


def add_described_corrections(model: nn.Module, ranks: Mapping[str, int]) -> None:
    """Give a model the corrections of another, whose numbers are loaded later.

    Raises:
        ValueError: the model has no such Linear modules, or none of such a rank.
    """
    modules: dict[str, Any] = dict(model.named_modules())
    for name, rank in ranks.items():
        module = modules.get(name)
        if not isinstance(module, (QuantizedLinear, QuantizedTransposed)):
            raise ValueError(f"corrections: {name!r} is no quantized Linear or Conv1D")
        rows = module.weight.movedim(module.output_axis, 0)
        most = min(rows.shape)
        if rank > most:  # of a file that may be anybody's: it is allocated before that is read
            raise ValueError(f"corrections: {name!r} has rank {most} at most, got {rank}")
        add_correction(module, rows.new_zeros(rank, rows.shape[1]), rows.new_zeros(len(rows), rank))
