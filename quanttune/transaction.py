"""Changes of a model that are made as a whole, or not at all."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn


@contextmanager
def transaction(model: nn.Module, *afterwards: Callable[[], object]) -> Iterator[ExitStack]:
    """Change modules of a model; an exception, Ctrl-C too, gives all of them back what they held.

    That is their classes, attributes, hooks, parameters, buffers and submodules. Values that are
    written into a tensor stay: what undoes that is called `afterwards`. Callbacks of the stack that
    is yielded come before.
    """
    with ExitStack() as undo:  # one, which is emptied at once
        undo.callback(torch.set_grad_enabled, torch.is_grad_enabled())
        for call in reversed(afterwards):
            undo.callback(call)
        for module in model.modules():
            undo.callback(_restorer(module))
        yield undo
        undo.pop_all()


@contextmanager
def gradients_as_before() -> Iterator[None]:
    """Leave gradients on, or off; torch.no_grad leaves them off if Ctrl-C comes while it begins."""
    enabled = torch.is_grad_enabled()
    try:
        yield
    finally:
        torch.set_grad_enabled(enabled)


def _restorer(module: nn.Module) -> Callable[[], None]:
    """Return what gives a module its class, its attributes, and what its dictionaries hold now."""
    kind, attributes = type(module), dict(vars(module))
    held = [(one, dict(one)) for one in attributes.values() if isinstance(one, dict)]

    def restore() -> None:
        module.__class__ = kind
        vars(module).clear()
        vars(module).update(attributes)
        for one, items in held:
            one.clear()
            one.update(items)

    return restore
