"""How far two computations of the same codes, or of the same outputs, are apart."""

from dataclasses import dataclass

import torch
from torch import Tensor

# of a layer that was given the same codes: the share of its codes that must be within one of the
# simulation's, and the share (or three codes) that may differ at all. At 4 bits 1.4 % do where ONNX
# Runtime rounds the bias of a Conv.
WITHIN_ONE = 0.999
DIFFER = 0.05


@dataclass(frozen=True)
class Layer:
    """The codes that a file makes of a site's input, beside those of the simulation."""

    site: str
    call: int  # of the site in a forward, from 0
    values: int
    differ: float  # share of the codes
    beyond_one: float  # share of those that differ by more than 1
    largest: int  # difference

    @property
    def name(self) -> str:
        return f"{self.site}, call {self.call}" if self.call else self.site

    @property
    def agrees(self) -> bool:
        """Whether no more codes differ than those of values near the border of two."""
        allowed = max(DIFFER, 3 / max(self.values, 1))
        return self.differ <= allowed and 1 - self.beyond_one >= WITHIN_ONE


def compare_codes(site: str, call: int, file: Tensor, simulation: Tensor) -> Layer:
    """Compare codes of uint8 or int8, of one shape."""
    difference = (file.to(torch.int16) - simulation.to(torch.int16)).abs()
    values = difference.numel()
    differ, beyond = int((difference > 0).sum()), int((difference > 1).sum())
    largest = int(difference.max()) if values else 0
    return Layer(site, call, values, differ / max(values, 1), beyond / max(values, 1), largest)


@dataclass(frozen=True)
class Distance:
    """How far an output is from another one, over all values of all batches."""

    mean: float
    largest: float
    argmax: float | None  # share of rows whose largest value is the same; None with one class


class Distances:
    """Take the differences of an output batch by batch."""

    def __init__(self) -> None:
        self._sum = self._largest = 0.0
        self._values = self._rows = self._same = 0

    def add(self, actual: Tensor, expected: Tensor) -> None:
        """Compare two outputs of one shape, the classes along the last dimension."""
        difference = (actual.double() - expected.double()).abs()
        self._sum += difference.sum().item()
        self._values += difference.numel()
        # max() would hide a NaN that comes second
        largest = torch.cat([difference.flatten(), difference.new_tensor([self._largest])]).max()
        self._largest = largest.item()
        if expected.dim() > 1 and expected.shape[-1] > 1:
            same = actual.argmax(-1) == expected.argmax(-1)
            self._rows += same.numel()
            self._same += int(same.sum())

    def distance(self) -> Distance:
        argmax = self._same / self._rows if self._rows else None
        return Distance(self._sum / max(self._values, 1), self._largest, argmax)
