"""Means and second moments of what layers are given, summed batch by batch."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...quantizer import ActivationQuantizer
from ...running import Data, StopForward, forward_batches
from ...token_mask import without_padding
from .layers import Layer, layers_of, rounded_input

Item = TypeVar("Item", "Group", Layer)
Sums = TypeVar("Sums", "Means", "Moments")
BYTES = 2**30  # of the moments that one pass over the data sums


@dataclass(frozen=True)
class Group:
    """Layers that are given the same tensor and round it alike, such as query, key and value."""

    layers: list[Layer]
    calls: int  # in one forward

    @property
    def leader(self) -> Any:
        """The module that is called first."""
        return self.layers[0].module

    @property
    def inputs(self) -> int:
        return self.layers[0].inputs


class Means:
    """Sums over tokens of what layers are given, float64: in float, and rounded."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.tokens = 0
        self._exact = torch.zeros(width, dtype=torch.float64, device=device)
        self._rounded = torch.zeros_like(self._exact)

    def add(self, x: Tensor, rounded: Tensor) -> None:
        rows = rows_of(x)
        self.tokens += len(rows)
        self._exact += rows.sum(0)
        self._rounded += rows_of(rounded).sum(0)

    @property
    def exact(self) -> Tensor:
        return self._exact / self.tokens

    @property
    def rounded(self) -> Tensor:
        return self._rounded / self.tokens


class Moments:
    """Sums over tokens of products of inputs, which have one more channel that is all 1.

    gram: rounded inputs with themselves, float64 (inputs + 1, inputs + 1).
    cross: rounded inputs (first dimension) with those in float; empty if not wanted.
    """

    def __init__(self, width: int, device: torch.device, cross: bool = False) -> None:
        self.gram = torch.zeros(width + 1, width + 1, dtype=torch.float64, device=device)
        self.cross = torch.zeros_like(self.gram) if cross else self.gram[:0]

    @property
    def tokens(self) -> float:
        return self.gram[-1, -1].item()

    @property
    def of_inputs(self) -> Tensor:
        """The products of the inputs alone, (inputs, inputs)."""
        return self.gram[:-1, :-1]

    def add(self, x: Tensor, rounded: Tensor) -> None:
        rows = _with_one(rounded)
        self.gram.addmm_(rows.T, rows)
        if len(self.cross):
            self.cross.addmm_(rows.T, _with_one(x))


def groups_of(model: nn.Module, data: Data, what: str | None = None) -> list[Group]:
    """Return the layers that data reach, in the order in which they are first called.

    Raises:
        ValueError: there are none, or no data are left.
    """
    layers = {layer.module: layer for layer in layers_of(model)}
    trace, calls = _Trace(), Counter[nn.Module]()
    with watching(layers, trace.see):
        for batch in data.track(what):
            forward_batches(model, [batch], data.mask)
            calls |= trace.calls
            trace.calls.clear()
    if not calls:
        raise ValueError(
            "no Linear or Conv1D with a rounded weight of its own was reached by data: is there "
            "one, and can data be iterated several times?"
        )
    groups: dict[nn.Module, list[Layer]] = {}
    for module, (leader, *others) in trace.leaders.items():
        shares = not others and calls[module] == calls[leader]
        groups.setdefault(leader if shares else module, []).append(layers[module])
    return [Group(members, calls[leader]) for leader, members in groups.items()]


def passes(items: Sequence[Item], matrices: int) -> Iterator[list[Item]]:
    """Cut layers or groups into those whose moments, so many matrices each, fit into BYTES."""
    chosen: list[Item] = []
    size = 0
    for item in items:
        needed = matrices * 8 * (item.inputs + 1) ** 2
        if chosen and size + needed > BYTES:
            yield chosen
            chosen, size = [], 0
        chosen.append(item)
        size += needed
    yield chosen


def sums_of(
    model: nn.Module,
    groups: Sequence[Group],
    data: Data,
    make: Callable[[int, torch.device], Sums],
    what: str | None = None,
) -> list[Sums]:
    """Return the sums of each group, from one pass that goes no further than their calls.

    make: Moments or Means.
    """
    sums = {group.leader: make(group.inputs, group.leader.weight.device) for group in groups}
    remaining = 0

    def see(module: Any, x: Tensor) -> None:
        nonlocal remaining
        sums[module].add(x, rounded_input(module, x))
        remaining -= 1
        if remaining == 0:
            raise StopForward

    with watching(sums, see):
        for batch in data.track(what):
            remaining = sum(group.calls for group in groups)
            forward_batches(model, [batch], data.mask)
    return list(sums.values())


class _Trace:
    """Which layers are called, and which one was the first that was given the same tensor."""

    def __init__(self) -> None:
        self.calls = Counter[nn.Module]()  # of the forward that is under way
        self.leaders: dict[nn.Module, set[nn.Module]] = {}
        self._leader: Any = None
        self._x: Tensor | None = None

    def see(self, module: Any, x: Tensor) -> None:
        if x is not self._x or _grid(module) != _grid(self._leader):
            self._leader, self._x = module, x
        self.leaders.setdefault(module, set()).add(self._leader)
        self.calls[module] += 1


def _grid(module: Any) -> tuple[Any, ...]:
    quantizer = module.input_quantizer
    if not isinstance(quantizer, ActivationQuantizer):
        return ()
    return quantizer.bits, quantizer.dynamic, float(quantizer.scale), quantizer.zero


@contextmanager
def watching(modules: Iterable[nn.Module], see: Callable[[Any, Tensor], None]) -> Iterator[None]:
    """Show what each of the modules is given to `see`."""
    with ExitStack() as undo:
        for module in modules:
            hook = module.register_forward_pre_hook(lambda module, args: see(module, args[0]))
            undo.callback(hook.remove)
        yield


def rows_of(x: Tensor) -> Tensor:
    """Return the tokens that are no padding, in float64."""
    return without_padding(x, "input").reshape(-1, x.shape[-1]).double()


def _with_one(x: Tensor) -> Tensor:
    """Return rows with a last channel of ones."""
    return F.pad(rows_of(x), (0, 1), value=1.0)
