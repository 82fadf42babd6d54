"""What the adapters of PEFT (LoRA and others) make of a model's modules.

A tensor of the model is one of what merging leaves. What is between an adapter's own matrices is
no such tensor, nor is the output of the layer below it: only their sum is.
"""

import re
import sys
from collections.abc import Iterator
from typing import Any

from torch import nn

# PeftModel, the method inside it, and the trained copy of a module that has no adapter
_WRAPPERS = re.compile(r"^base_model\.model\.|\.modules_to_save\.[^.]+")


def has_adapters(model: nn.Module) -> bool:
    """Tell whether a part of a model has an adapter that is not merged."""
    return any(base_of(module) is not module for module in model.modules())


def base_of(module: nn.Module) -> nn.Module:
    """Return the module that an adapter was put around, or the module itself."""
    adapter, copied = _classes()
    if isinstance(module, adapter):
        base: nn.Module = module.get_base_layer()  # type: ignore[operator]
        return base
    if isinstance(module, copied):
        return module.original_module  # type: ignore[return-value]
    return module


def merged_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield what `named_modules` would of the model without adapters, by the same names.

    A module with an adapter stands for its base: it gets its input, and returns what the merged one
    will.
    """
    if not any(_classes()):
        yield from model.named_modules()
        return
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module in inside:
            continue
        base = base_of(module)
        if base is not module:
            is_whole = isinstance(module, _classes()[0]) or not any(base.children())
            inside.update((module if is_whole else base).modules())
        yield _WRAPPERS.sub("", name), module


def _classes() -> tuple[Any, Any]:
    """Return PEFT's classes of adapters and of copies; none unless somebody has imported it."""
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    others = sys.modules.get("peft.utils.other")
    return (
        getattr(tuners, "BaseTunerLayer", ()),
        getattr(others, "AuxiliaryTrainingWrapper", ()),
    )
