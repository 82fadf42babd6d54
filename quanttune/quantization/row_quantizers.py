"""Quantizers of weights that are cut into rows with scales of their own: stacks, and groups."""

from abc import abstractmethod

import torch
from torch import Tensor

from .quantizer import WeightQuantizer


class RowQuantizer(WeightQuantizer):
    """Round a weight as rows that lie one behind the other; `axis` is that of the rows."""

    @abstractmethod
    def rows(self, weight: Tensor) -> Tensor:
        """Return a weight as the rows that have scales."""

    @abstractmethod
    def restored(self, rows: Tensor, shape: torch.Size) -> Tensor:
        """Return rows as the weight that they are of."""

    def round(self, weight: Tensor) -> Tensor:
        return self.restored(super().round(self.rows(weight)), weight.shape)

    def scale_of(self, weight: Tensor) -> Tensor:
        return super().scale_of(self.rows(weight))

    def scales_in(self, weight: Tensor) -> torch.Size:
        return super().scales_in(self.rows(weight))


class StackQuantizer(RowQuantizer):
    """Round a stack of matrices, as experts have them: a scale per matrix and output channel.

    `axis` is that of the rows they make, one behind the other: (matrices * outputs, inputs).
    """

    def __init__(self, bits: int, axis: int | None, outputs: int) -> None:
        super().__init__(bits, axis)
        self.outputs = outputs  # the dimension of the stack that has them, 1 or 2

    def rows(self, weight: Tensor) -> Tensor:
        return weight.movedim(self.outputs, 1).flatten(0, 1)

    def restored(self, rows: Tensor, shape: torch.Size) -> Tensor:
        return rows.unflatten(0, (shape[0], -1)).movedim(1, self.outputs)


class GroupQuantizer(RowQuantizer):
    """Round a matrix in groups: a scale per output channel and `size` inputs in a row.

    `axis` is that of (outputs * groups, size).
    """

    granularity = "group"

    def __init__(self, bits: int, outputs: int, size: int) -> None:
        super().__init__(bits, 0)
        self.outputs, self.size = outputs, size  # the dimension of the matrix that has the outputs

    def rows(self, weight: Tensor) -> Tensor:
        return weight.movedim(self.outputs, 0).reshape(-1, self.size)

    def restored(self, rows: Tensor, shape: torch.Size) -> Tensor:
        return rows.reshape(shape[self.outputs], -1).movedim(0, self.outputs)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, group_size={self.size}"
