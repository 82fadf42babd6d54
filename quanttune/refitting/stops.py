"""Where forwards stop to be refitted: behind each Linear, or the sum that its output goes into."""

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from ..quantization.functional.functional_sites import SUMS
from ..quantization.token_mask import inside


@dataclass(frozen=True)
class Stop:
    """A Linear that has just been computed, in one forward."""

    name: str
    x: Tensor
    output: Tensor
    other: Tensor | None  # what the output is added to, of its shape; None if it is not
    counted: Tensor | None  # which tokens are no padding, as a vector; None if all count


class Stops(TorchFunctionMode):
    """Call `at` behind each Linear of a forward, and go on with the output that it returns.

    Args:
        names: of the modules by their weights' `id`. A module is met once per forward.
        summed: names of those whose output goes into a sum; there they are met.
    """

    def __init__(
        self, names: Mapping[int, str], summed: Container[str], at: Callable[[Stop], Tensor]
    ) -> None:
        super().__init__()
        self._names, self._summed, self._at = names, summed, at
        self._made = WeakTensorKeyDictionary()  # outputs that may go into a sum

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            return self._linear(func(*args, **kwargs), **_named(*args, **kwargs))
        if func in SUMS and not kwargs:
            args = self._with_stop(args)
        result = func(*args, **kwargs)
        first = args[0] if args else None
        if isinstance(first, Tensor) and first in self._made and _is_same(result, first):
            self._made[result] = self._made[first]  # such as dropout, while it is evaluated
        return result

    def _linear(self, y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        name = self._names.get(id(weight))
        if name is None:
            return y
        if name in self._summed:
            self._made[y] = name, x
            return y
        return self._at(Stop(name, x, y, None, _counted(x)))

    def _with_stop(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        for i, y in enumerate(args[:2]):
            other = args[1 - i]
            if not (isinstance(y, Tensor) and isinstance(other, Tensor) and y in self._made):
                continue
            if y.shape == other.shape:
                name, x = self._made[y]
                y = self._at(Stop(name, x, y, other, _counted(x)))
                return (y, other) if i == 0 else (other, y)
        return args


def stopping_modules(model: nn.Module, among: Container[str] | None = None) -> dict[int, str]:
    """Return the Linear modules whose weight is theirs alone, by the `id` of the weight.

    among: the names of those that are wanted; None for all.
    """
    holders: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        holders.setdefault(id(parameter), []).append(name)
    alone = {names[0] for names in holders.values() if len(names) == 1}
    return {
        id(module.weight): name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and f"{name}.weight".lstrip(".") in alone
        and (among is None or name in among)
    }


def _named(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> dict[str, Tensor]:
    """Return what F.linear was given, by position or by name."""
    return {"x": input, "weight": weight}


def _is_same(result: Any, x: Tensor) -> bool:
    return (
        isinstance(result, Tensor)
        and result.data_ptr() == x.data_ptr()
        and result.shape == x.shape
        and result.stride() == x.stride()
    )


def _counted(x: Tensor) -> Tensor | None:
    counted = inside(x, "input")
    return None if counted is None else counted.expand(*x.shape[:-1], 1).flatten()
