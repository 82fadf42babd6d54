"""The data, the model and the metric of each job, and the experiment that compares its arms."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

_RECIPES = {"minilm": "MiniLM", "digits": "Digits", "smollm2": "SmolLM2", "whisper": "Whisper"}
NAMES = tuple(_RECIPES)


def recipe(name: str) -> Callable[..., Any]:
    """Return the recipe class of a name; its dependencies are imported only now."""
    if name not in _RECIPES:
        raise ValueError(f"task must be one of {', '.join(NAMES)}, got {name!r}")
    return getattr(import_module(f".{name}", __package__), _RECIPES[name])
