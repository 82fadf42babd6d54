"""The operations that a module of a quantized model calls, and how each is rounded."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from . import places
from .iteration import children_of
from .modes import Carried, class_of

CALLS = "_functional_calls"  # the attribute of a watched module that holds its Calls


@dataclass
class Operation:
    """An operation at a place. Without a name it stays in float.

    kinds: of coverage, by the part of the operation that is rounded; "" where there is one only.
    weight: which operand of a product is a parameter, or made of parameters.
    owner: the module, seen from the one that calls, whose Linear this is.
    parameter: the name, in the whole model, of a parameter that only this operation rounds.
    is_score: a sum that goes into a softmax.
    """

    name: str | None = None
    kinds: dict[str, str] = field(default_factory=dict)
    weight: int | None = None
    owner: str | None = None
    parameter: str | None = None
    is_score: bool = False

    def quantizer(self, part: str) -> str:
        """Return the attribute of the calling module that rounds a part."""
        return f"{self.name}_{part}_quantizer" if part else f"{self.name}_quantizer"

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)


@dataclass
class Calls:
    """What a module calls, by the way there from its forward (places.py)."""

    module: str
    is_childless: bool
    operations: dict[str, Operation] = field(default_factory=dict)

    def find(self, way: str) -> Operation | None:
        """Return what is known of an operation.

        A function may be called from elsewhere than before: a checkpoint's call has a line of its
        own. Where it was met on one way only, that is the one.
        """
        if way in self.operations:
            return self.operations[way]
        alike = [o for other, o in self.operations.items() if _end(other) == _end(way)]
        return alike[0] if len(alike) == 1 and places.JOIN in way else None

    def next_name(self, stem: str) -> str:
        """Return the name of another operation of a kind: add0, add1, ..."""
        names = [operation.name or "" for operation in self.operations.values()]
        return f"{stem}{sum(name.rstrip('0123456789') == stem for name in names)}"


@dataclass
class Call:
    """An operation that is under way."""

    module: nn.Module
    way: str
    is_apart: bool  # whether a module calls it that is none of the quantized ones
    arguments: tuple[Any, Any] | None = None  # of the module, where they are known

    @property
    def calls(self) -> Calls:
        return self.module.__dict__[CALLS]  # type: ignore[no-any-return]

    def operation(self, is_settled: bool) -> Operation | None:
        """Return what is known of it, or once the sites are settled what it must be."""
        return self.calls.find(self.way) if is_settled else self.calls.operations.get(self.way)

    def quantizer(self, operation: Operation, part: str) -> Any:
        """Return what rounds a part of the operation, if it is covered."""
        return children_of(self.module).get(operation.quantizer(part))

    def round(self, operation: Operation, part: str, x: Tensor) -> Tensor:
        """Round a part of the operation, if it is covered."""
        quantizer = self.quantizer(operation, part)
        return x if quantizer is None else quantizer(x)

    def is_rounded(self, operation: Operation) -> bool:
        """Tell whether any part of the operation is covered."""
        found = (self.quantizer(operation, part) for part in operation.kinds)
        return not all(isinstance(quantizer, nn.Identity | None) for quantizer in found)

    def refusal(self, what: str) -> RuntimeError:
        """Return what to raise where calibration has not been."""
        name = f" ({self.calls.module})" if self.calls.module else ""
        return RuntimeError(
            f"{class_of(self.module).__name__}{name} {what} at {self.way}, which was "
            "never reached during calibration: quantize with data that takes the model "
            "this way too, or in the versions of the libraries it was quantized with"
        )


def _end(way: str) -> str:
    """Return a way without the lines that functions are called at, but for the last."""
    *above, last = way.split(places.JOIN)
    return places.JOIN.join([*(step.partition("+")[0] for step in above), last])


def call_under_way(modules: Mapping[str, nn.Module]) -> Call:
    """Return the operation that is under way, in one of the modules."""
    if torch.compiler.is_dynamo_compiling():
        module, way, is_apart = _traced().split("\n")
        return Call(modules[module], way, is_apart != "")
    place = places.find()
    by = place.variables["self"]
    if isinstance(by, Carried):
        return Call(by.module, by.join(place.way), place.is_apart)
    arguments = place.variables["args"], place.variables["kwargs"]
    return Call(by, place.way, place.is_apart, arguments)


def _traced() -> str:
    place = places.trace()
    name = place.variables["self"].__dict__[CALLS].module
    return "\n".join([name, place.way, "apart" if place.is_apart else ""])


# torch.compile runs it while it traces, and takes what it returns for a constant
_traced._dynamo_marked_constant = True  # type: ignore[attr-defined]
