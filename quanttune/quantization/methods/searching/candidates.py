"""What a factor of a product may be rounded to, and which of it was chosen."""

import copy
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from ....fake_quantizer import fake_quant, scale_of
from ...functional.iteration import children_of
from ...quantizer import ActivationQuantizer
from ...value_grids import TwinQuantizer
from ..rounding.layers import Grid, Layer

SPLITS = 20  # of a softmax: 2^0 to 2^-19


class Activation:
    """The quantizers that one tensor may go through; the first is the one that it does."""

    def __init__(self, quantizer: nn.Module | None) -> None:
        self.original = quantizer
        self.choices: list[ActivationQuantizer] = []
        self.chosen = 0
        if isinstance(quantizer, ActivationQuantizer):
            self.choices.append(quantizer)

    @property
    def is_searched(self) -> bool:
        return len(self.choices) > 1

    def widen(self, factors: Sequence[float]) -> None:
        """Let the range be so many times what it is, if it is a constant."""
        one = self.original
        if isinstance(one, ActivationQuantizer) and one.calibrated and not one.dynamic:
            self.choices += [covering(one, factor) for factor in factors]

    def split(self, values: Sequence[Tensor], factors: Sequence[float]) -> None:
        """Let the tensor have twin ranges: of a probability, or of what an activation returns."""
        one = self.original
        if not (self.is_searched and isinstance(one, ActivationQuantizer)):
            return
        if not one.symmetric:
            raise ValueError(
                "twin ranges have no zero points: leave symmetric=True, or take PTQ4ViT(twin=False)"
            )
        steps = 2 ** (one.bits - 1)
        made = [TwinQuantizer.after(one) for _ in range(SPLITS)]
        if one.kind == "probability":
            splits = [2.0**-m for m in range(SPLITS)]
            self.choices += [
                twin.of(1 / steps, at / steps, at) for twin, at in zip(made, splits, strict=True)
            ]
        elif (low := min(x.min().item() for x in values)) < 0:
            self.choices += [
                TwinQuantizer.after(one).of(scale_of(one.absmax * f, one.bits), -low / steps, 0.0)
                for f in (1.0, *factors)
            ]

    def rounded(self, x: Tensor, choice: int | None = None) -> Tensor:
        """Round the tensor as one of the choices does, by default the chosen one."""
        if not self.choices:
            return x
        return self.choices[self.chosen if choice is None else choice].round(x)

    def choose(self, loss_of: Callable[[int], float]) -> bool:
        """Take the choice of the least loss, and tell whether it is another one."""
        before = self.chosen
        least = loss_of(before)
        for choice in range(len(self.choices) if self.is_searched else 0):
            if (loss := loss_of(choice)) < least:
                self.chosen, least = choice, loss
        return self.chosen != before

    def install(self, owners: Iterable[tuple[nn.Module, str]]) -> None:
        """Let modules round it as was chosen, by the names of their quantizers."""
        if self.chosen:
            for owner, name in owners:
                children_of(owner)[name] = copy.deepcopy(self.choices[self.chosen])


class Weight:
    """The scales that the rows of a layer's weight may have, as factors of those of min-max."""

    def __init__(self, layer: Layer, factors: Sequence[float]) -> None:
        self.layer = layer
        self.rows = layer.rows.float()
        self.scale = layer.grid(layer.rows).scale
        self.axis = 0 if self.scale.dim() else None
        self.choices = (1.0, *factors)
        self.chosen = torch.zeros(self.scale.shape, dtype=torch.int64, device=self.scale.device)

    def rounded(self, choice: int | None = None) -> Tensor:
        """Round the rows with one factor for all, by default each with its own."""
        return fake_quant(self.rows, self.scale_of(choice), self.layer.quantizer.bits, self.axis)

    def choose(self, loss_of: Callable[[Tensor], Tensor]) -> bool:
        """Take the choices of the least loss, for each row or for all, and tell if one changes."""
        before = self.chosen
        least = loss_of(self.rounded()).view_as(before)
        for choice in range(len(self.choices)):
            loss = loss_of(self.rounded(choice)).view_as(before)
            better = loss < least
            self.chosen = self.chosen.where(~better, choice)
            least = torch.minimum(least, loss)
        return not torch.equal(self.chosen, before)

    def install(self) -> None:
        """Round the layer's weight, and let its scales be constant."""
        self.layer.write(self.layer.rows, Grid(self.scale_of(), self.layer.quantizer.bits))

    def scale_of(self, choice: int | None = None) -> Tensor:
        """Return the scales with one factor for all, by default each with its own."""
        if choice is not None:
            return self.scale * self.choices[choice]
        return self.scale * self.scale.new_tensor(self.choices)[self.chosen]


def covering(quantizer: ActivationQuantizer, factor: float) -> ActivationQuantizer:
    """Return a copy of a quantizer that covers so many times its range."""
    made = copy.deepcopy(quantizer)
    for name in quantizer.range_names:
        setattr(made, name, getattr(quantizer, name) * factor)
    made.set_bits(made.bits)
    return made
