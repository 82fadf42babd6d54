"""The layers whose weights a method rounds, as rows of float64, one per output."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ....fake_quantizer import integer_range
from ...modules import QuantizedConvolution, QuantizedEmbedding, QuantizedModule, holds
from ...quantizer import ActivationQuantizer, WeightQuantizer
from ...row_quantizers import GroupQuantizer
from ...state import weight_quantizers


@dataclass(frozen=True)
class Grid:
    """The grids of rows of weights: float32 scales of rows, of all, or of values; their width."""

    scale: Tensor  # (rows,) or (); (rows, columns) of grids that change along a row
    bits: int

    @property
    def step(self) -> Tensor:
        """The scale as float64 (rows, 1), (1, 1) or (rows, columns)."""
        return self.scale.double() if self.scale.dim() == 2 else self.scale.double().view(-1, 1)

    def clamp(self, codes: Tensor) -> Tensor:
        """Return codes that are in range."""
        return codes.clamp(*integer_range(self.bits))

    def codes(self, rows: Tensor) -> Tensor:
        """Return the nearest code of each value, in the type of the rows."""
        return self.clamp((rows / self.step).round())

    def nearest(self, rows: Tensor) -> Tensor:
        """Return the nearest value of the grid."""
        return self.codes(rows) * self.step

    def of(self, rows: slice, columns: slice | Tensor) -> "Grid":
        """Return the grid of some of the rows, and of some columns of them."""
        scale = self.scale[rows] if self.scale.dim() else self.scale
        return Grid(scale[:, columns] if scale.dim() == 2 else scale, self.bits)


class Layer:
    """A quantized Linear or Conv1D, and the quantizer of its weight."""

    def __init__(self, module: Any, quantizer: WeightQuantizer) -> None:
        self.module, self.quantizer = module, quantizer

    @property
    def inputs(self) -> int:
        """How many columns the rows have."""
        count: int = self.module.weight.shape[1 - self.module.output_axis]
        return count

    @property
    def group_size(self) -> int:
        """How many inputs of an output share a scale."""
        return self.quantizer.size if isinstance(self.quantizer, GroupQuantizer) else self.inputs

    @property
    def rows(self) -> Tensor:
        """The weight as float64 (outputs, inputs)."""
        return self._swap(self.module.weight.detach().double())

    def grid(self, rows: Tensor) -> Grid:
        """Return the grid that just covers rows."""
        scale = self.quantizer.scale_of(self._swap(rows))
        if isinstance(self.quantizer, GroupQuantizer):
            scale = scale.view(len(rows), -1).repeat_interleave(self.quantizer.size, 1)
        return Grid(scale, self.quantizer.bits)

    @torch.no_grad()
    def write(self, rows: Tensor, grid: Grid) -> None:
        """Make rows the weight, each value the nearest on a grid that is constant from now on."""
        scale = grid.scale
        if isinstance(self.quantizer, GroupQuantizer):
            scale = scale[:, :: self.quantizer.size].clone().flatten()
        self.quantizer.scale = scale
        self.module.weight.copy_(self.quantizer.round(self._swap(rows).float()))

    def _swap(self, weight: Tensor) -> Tensor:
        """Turn a weight into rows, or rows into a weight."""
        return weight.movedim(self.module.output_axis, 0)


def rounded_input(module: Any, x: Tensor) -> Tensor:
    """Return what a layer multiplies: its rounded input, or the input where that stays float."""
    quantizer = module.input_quantizer
    return quantizer.round(x) if isinstance(quantizer, ActivationQuantizer) else x


def layers_of(model: nn.Module) -> list[Layer]:
    """Return the Linear and Conv1D modules whose weights are rounded, and are theirs alone.

    A weight that is tied to another module's, such as a table of embeddings, means something else
    there; it is left to nearest rounding, as those of convolutions, embeddings and experts are,
    and those that a parametrization computes.
    """
    owners = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    return [
        Layer(module, quantizer)
        for module, quantizer in weight_quantizers(model).values()
        if isinstance(module, QuantizedModule)
        and not isinstance(module, (QuantizedConvolution, QuantizedEmbedding))
        and holds(module)
        and owners[id(module.weight)] == 1  # type: ignore[attr-defined]
    ]
