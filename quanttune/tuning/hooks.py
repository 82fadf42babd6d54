"""Hooks that leave nothing behind in a copy of a model, and what they ask of a forward."""

from typing import Any

import torch
from torch import nn


class Hook:
    """A method with its first arguments, as a hook. A copy of the model gets an inert one."""

    def __init__(self, method: Any = None, *arguments: Any) -> None:
        self.method, self.arguments = method, arguments

    def __call__(self, *arguments: Any) -> Any:
        return self.method(*self.arguments, *arguments) if self.method else None

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return Hook, ()


def recomputing() -> bool:
    """Tell whether a backward pass is under way: a forward within it is that of a checkpoint."""
    return torch._C._current_graph_task_id() != -1


def make_compiler_see_hooks() -> None:
    """Let torch.compile tell a model with hooks from one without; by default it takes no notice.

    Else a compiled model would go on without those of a tuner that is attached later, or with those
    of a model of the same class.
    """
    import torch._dynamo.config  # takes 1.5 s, unless transformers or timm has done it

    torch._dynamo.config.skip_nnmodule_hook_guards = False
    torch.compiler.reset()  # what was compiled before


def refuse_compiled_parts(model: nn.Module) -> None:
    """Raise a ValueError if a part of the model, and not the whole, is compiled."""
    for name, module in model.named_modules():
        if module is not model and (
            isinstance(module, torch._dynamo.OptimizedModule) or module._compiled_call_impl
        ):
            raise ValueError(
                f"{name} of {type(model).__name__} is compiled by itself: what it observes cannot "
                "be told from the others. Compile the whole model that is attached, or none of it"
            )


def is_attached(model: nn.Module) -> bool:
    """Tell whether the model, or a part of it, has a tuner."""
    hooks: list[Any] = []
    for module in model.modules():
        hooks += module._forward_pre_hooks.values()
    return any(isinstance(hook, Hook) and hook.method for hook in hooks)
