"""What a forward finds that goes through the children of its module: its layers, no quantizers."""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from ..quantizer import is_quantizer

Children = dict[str, nn.Module | None]


def children_of(module: nn.Module) -> Children:
    """Return the children of a module by name, quantizers too."""
    return module.__dict__["_modules"]  # type: ignore[no-any-return]


def ways_through(base: Any, is_called: Callable[[nn.Module], bool]) -> dict[str, Any]:
    """Return the methods of a class by which children are reached one after the other.

    is_called: tells whether a module is being called. Else they are those of the class, so that
    `to` and `train` reach quantizers too.
    """
    methods: dict[str, Any] = {"named_children": _named_children}
    if issubclass(base, (nn.Sequential, nn.ModuleList)):
        methods |= {"__iter__": _in_order, "__len__": len, "__getitem__": _item}
    elif issubclass(base, nn.ModuleDict):
        methods |= {"__iter__": iter, "__len__": len}
        # functions of ours: torch.compile cannot trace those of the type
        methods |= {"keys": lambda x: x.keys(), "items": lambda x: x.items()}
        methods["values"] = lambda x: x.values()

    def made(name: str, found: Callable[..., Any]) -> Callable[..., Any]:
        def method(self: Any, *args: Any) -> Any:
            if is_called(self):
                return found(_layers(self), *args)
            return getattr(base, name)(self, *args)

        return method

    return {name: made(name, found) for name, found in methods.items()}


def _layers(module: nn.Module) -> Children:
    children = list(children_of(module).items())  # calibration adds to them meanwhile
    return {name: child for name, child in children if not is_quantizer(name, child)}


def _named_children(layers: Children) -> Iterator[tuple[str, nn.Module]]:
    names: dict[nn.Module, str] = {}
    for name, child in layers.items():
        if child is not None:
            names.setdefault(child, name)
    return iter([(name, child) for child, name in names.items()])


def _in_order(layers: Children) -> Iterator[nn.Module | None]:
    return iter(layers.values())


def _item(layers: Children, index: Any) -> Any:
    if isinstance(index, slice):
        return nn.Sequential(OrderedDict(list(layers.items())[index]))  # type: ignore[arg-type]
    return list(layers.values())[index]
