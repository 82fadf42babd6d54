"""What users' libraries put on the instances of a model's modules: devices, and forwards."""

from contextlib import ExitStack
from functools import partial
from typing import Any

from torch import nn


def check_devices(model: nn.Module) -> None:
    """Refuse a model that is not whole on one device.

    Raises:
        ValueError: parameters are on several devices, or on meta, where they have no values.
    """
    places: dict[str, str] = {}
    for name, parameter in model.named_parameters():
        places.setdefault(str(parameter.device), name)
    if "meta" in places:
        raise ValueError(
            f"{places['meta']} is on the device meta, without values: a model that is offloaded, "
            "or not loaded yet, cannot be quantized. Load it onto one device, without offloading"
        )
    if len(places) > 1:
        found = ", ".join(f"{name} on {device}" for device, name in places.items())
        raise ValueError(f"the model must be on one device, got {found}: move it to one")


def free_forwards(model: nn.Module, undo: ExitStack) -> None:
    """Let forwards that are set on instances reach the forward of a class that is to be changed.

    Those of accelerate, such as the hooks of a device_map, call what the module did before.

    Raises:
        ValueError: a module has another one, which would hide what is quantized.
    """
    own = [(name, m) for name, m in model.named_modules() if "forward" in vars(m)]
    for name, module in own:
        inner = "_old_forward" if hasattr(module, "_hf_hook") else "forward"
        if not _is_of_class(vars(module)[inner], module):
            raise ValueError(
                f"{name or type(model).__name__} has a forward of its own, set on the instance, "
                "behind which a quantized module would not run: delete it (`del module.forward`), "
                "or set it after quantize (as torch.compile and accelerate's prepare do)"
            )
        undo.callback(setattr, module, inner, vars(module)[inner])
        setattr(module, inner, partial(_forward, module))


def _is_of_class(forward: Any, module: nn.Module) -> bool:
    found = getattr(forward, "__func__", None), getattr(forward, "__self__", None)
    return found == (type(module).forward, module) or getattr(forward, "func", None) is _forward


def _forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Run the forward of a module's class, whichever that is by now."""
    return type(module).forward(module, *args, **kwargs)
