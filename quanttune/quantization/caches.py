"""Keys and values that a model returns for its next call, and nobody asked for."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn


@contextmanager
def without_caches(model: nn.Module) -> Iterator[None]:
    """Keep a model from returning caches, whichever of its configurations asks for them.

    A decoder's may be its own, or a part of the whole model's, such as `text_config`.
    """
    with ExitStack() as undo:
        for config in _configurations(model):
            if getattr(config, "use_cache", None):
                undo.callback(setattr, config, "use_cache", config.use_cache)
                config.use_cache = False
        yield


def _configurations(model: nn.Module) -> list[Any]:
    """Return the configurations of a model and its modules, and those that they hold."""
    modules = model.modules() if isinstance(model, nn.Module) else ()  # or any function
    waiting = [getattr(module, "config", None) for module in modules]
    found: dict[int, Any] = {}
    while waiting:
        config = waiting.pop()
        is_one = hasattr(config, "use_cache") or hasattr(config, "sub_configs")
        if is_one and id(config) not in found:
            found[id(config)] = config
            waiting += vars(config).values()
    return list(found.values())
