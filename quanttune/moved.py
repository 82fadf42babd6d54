"""Names of modules that documentation once gave: they work for one more release, with a warning."""

import warnings
from collections.abc import Callable
from importlib import import_module
from typing import Any


def moved(old: str, new: str) -> Callable[[str], Any]:
    """Return the `__getattr__` of a module that is elsewhere now."""

    def get(name: str) -> Any:
        if name.startswith("__"):  # what importing itself asks for
            raise AttributeError(name)
        value = getattr(import_module(new), name)
        warnings.warn(f"{old} is {new} now", DeprecationWarning, stacklevel=2)
        return value

    return get
