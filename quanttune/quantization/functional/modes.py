"""Let a mode see the operations of modules, however they are called.

A watched module is of a subclass of its class, of the same name, whose forward enters the mode
where no module above it has. So nothing is left behind by a call that ends, in whatever way it
ends. A copy, pickled or not, is watched too. Its forward may go through its children, as that of
Sequential does: meanwhile the quantizers that it was given are not among them.
"""

import functools
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils import checkpoint

from . import places
from .iteration import ways_through

ATTRIBUTE = "_watch"  # of a watched module: what it is watched by


class Watch(Protocol):
    """What modules are watched by."""

    def mode(self, inputs: Any) -> AbstractContextManager[Any]:
        """Return what is entered around the outermost call, which has these arguments."""
        ...


class _Watched:
    """The mark of the classes that `_watched` makes."""


class _Here(threading.local):
    """Who watches a call that is under way in this thread."""

    def __init__(self) -> None:
        self.under_way: list[Watch] = []


_here = _Here()


def watch(module: nn.Module, by: Watch) -> None:
    """Let a module be watched."""
    _carry_into_checkpoints()
    module.__dict__[ATTRIBUTE] = by
    own: Any = class_of(module)  # to mypy a class of modules is not hashable
    module.__class__ = _watched(own)


def unwatch(module: nn.Module) -> None:
    """Take `watch` back, as far as it came."""
    module.__dict__.pop(ATTRIBUTE, None)
    module.__class__ = class_of(module)


def class_of(module: nn.Module) -> type[nn.Module]:
    """Return the class of a module, which may be watched."""
    kind = type(module)
    return kind.__bases__[1] if issubclass(kind, _Watched) else kind


def under_way() -> Watch | None:
    """Return who watches what is under way in this thread."""
    return _here.under_way[-1] if _here.under_way else None


@functools.cache
def _watched(base: Any) -> Any:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        by = self.__dict__.get(ATTRIBUTE)
        # what is made of a module, such as a slice of a Sequential, has none
        if by is None or _is_under_way(by):
            return base.forward(self, *args, **kwargs)
        if torch.compiler.is_dynamo_compiling():
            with by.mode((args, kwargs)):
                return base.forward(self, *args, **kwargs)
        return _run(by, (args, kwargs), base.forward, self, *args, **kwargs)

    def reduce(self: Any, protocol: Any) -> Any:
        make, args, *state = base.__reduce_ex__(self, protocol)
        # the default names type(self), which nobody can import
        args = tuple(base if arg is type(self) else arg for arg in args)
        return (_make_watched, (make, args), *state)

    def is_called(self: Any) -> bool:
        by = self.__dict__.get(ATTRIBUTE)
        return by is not None and (torch.compiler.is_dynamo_compiling() or _is_under_way(by))

    functools.update_wrapper(forward, base.forward)
    places.begins(forward.__code__, "self")
    names: dict[str, Any] = {"forward": forward, "__reduce_ex__": reduce}
    names |= ways_through(base, is_called)
    names |= {name: getattr(base, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(base)(base.__name__, (_Watched, base), names)


def _make_watched(make: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    module = make(*args)
    own: Any = type(module)
    module.__class__ = _watched(own)
    return module


def _run(by: Watch, inputs: Any, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run the outermost call of what is watched. An interrupt leaves no mode of it behind either.

    It may come anywhere, also at the first line of a context manager's `__exit__`.
    """
    above, depth = len(_here.under_way), torch._C._len_torch_function_stack()

    def leave() -> None:
        del _here.under_way[above:]
        while torch._C._len_torch_function_stack() > depth:
            torch._C._pop_torch_function_stack()

    try:
        _here.under_way.append(by)
        by.mode(inputs).__enter__()
        return function(*args, **kwargs)
    finally:
        try:
            leave()
        finally:
            leave()  # what an interrupt has left of it


def _is_under_way(by: Watch) -> bool:
    """Tell whether something that is watched by `by` is being called in this thread."""
    if torch.compiler.is_dynamo_compiling():
        return _is_traced()
    return any(other is by for other in _here.under_way)


def _is_traced() -> bool:
    """Do what `_is_under_way` does for the module that torch.compile traces."""
    self, *above = places.traced("self")
    by = self.__dict__[ATTRIBUTE]
    known = [getattr(module, "__dict__", {}).get(ATTRIBUTE) for module in above]
    return any(other is by for other in (*known, *_here.under_way))


_is_traced._dynamo_marked_constant = True  # type: ignore[attr-defined]


class Carried:
    """A function that a checkpoint runs again, in backward, where no module calls it."""

    def __init__(self, function: Callable[..., Any], by: Watch) -> None:
        self.function, self.by = function, by
        place = places.find()
        above, self.way = place.variables["self"], place.way
        self.module: nn.Module = above.module if isinstance(above, Carried) else above
        if isinstance(above, Carried):
            self.way = above.join(self.way)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if any(other is self.by for other in _here.under_way):
            return self.function(*args, **kwargs)
        return _run(self.by, (), self.function, *args, **kwargs)

    def join(self, way: str) -> str:
        """Return a way that begins at the module, of one that begins here."""
        return places.JOIN.join(filter(None, (self.way, way)))


places.begins(Carried.__call__.__code__, "self")


def _carried(function: Callable[..., Any]) -> Callable[..., Any]:
    by = under_way()
    return Carried(function, by) if by else function


@functools.cache
def _carry_into_checkpoints() -> None:
    """Let checkpoints run functions again under what they ran under first.

    PyTorch has no hook for it: its two kinds of checkpoints keep the function in these classes
    (2.9 to 2.15). Without a watch that is under way they do what they did.
    """
    reentrant, frame = checkpoint.CheckpointFunction, checkpoint._CheckpointFrame

    class CheckpointFunction(reentrant):  # type: ignore[misc, valid-type]
        @classmethod
        def apply(cls, function: Callable[..., Any], *args: Any) -> Any:
            return reentrant.apply(_carried(function), *args)

    class CheckpointFrame(frame):  # type: ignore[misc, valid-type]
        def __init__(self, recompute: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
            super().__init__(_carried(recompute), *args, **kwargs)

    kept_in: Any = checkpoint
    kept_in.CheckpointFunction, kept_in._CheckpointFrame = CheckpointFunction, CheckpointFrame
