"""Which tokens of a call count, and which are padding."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

# the name of an argument of the model's forward, or a function of all its arguments by name
Mask = str | Callable[[Mapping[str, Any]], Tensor | None]


class Masks:
    """Finds the mask of a call among the arguments of the model's forward."""

    def __init__(self, model: nn.Module, mask: Mask | None) -> None:
        self._model, self._mask = model, mask
        self._signature = inspect.signature(model.forward)
        names = list(self._signature.parameters)
        if isinstance(mask, str):
            self._position = names.index(mask) if mask in names else len(names)

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
        """Return which tokens count, as bool (samples, tokens); None if the call does not tell."""
        mask: Any = self._mask
        if isinstance(mask, str):
            given = args[self._position] if self._position < len(args) else None
            mask = kwargs.get(mask, given)
        elif mask is not None:
            mask = mask(self._signature.bind(*args, **kwargs).arguments)
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            return None
        if mask.shape[0] != batch_size(self._model, args, kwargs):  # of tokens to tokens
            return None
        return mask != 0


def holds_tokens(x: Tensor, shape: torch.Size) -> bool:
    """Tell whether x is (samples, tokens, ...) or (samples * tokens, channels)."""
    return x.shape[:2] == shape if x.dim() > 2 else x.shape[0] == shape.numel()


def batch_size(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """Return the first dimension of the first tensor that the model is called with."""
    main = kwargs.get(getattr(model, "main_input_name", None) or "")  # transformers names it
    for leaf in tree_leaves((main, args, dict(kwargs))):
        if isinstance(leaf, Tensor) and leaf.dim():
            return leaf.shape[0]
    raise ValueError(
        f"{type(model).__name__} was called without a tensor to take the batch size from"
    )
