"""Which tokens of a call count, and which are padding.

A mask belongs to the sequence that it was handed over with: `attention_mask` to `input_ids`,
`decoder_attention_mask` to `decoder_input_ids`, that of a submodule's call to what else it gets.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

# the name of an argument of the model's forward, or a function of all its arguments by name
Mask = str | Callable[[Mapping[str, Any]], Tensor | None]

# the default stands for what other libraries call theirs, too: timm's NaFlexVit
_ALIASES = {"attention_mask": ("attention_mask", "patch_valid")}


class Handed(NamedTuple):
    """A mask as a module was called with it, and the sequences that it is for.

    prefix: of its name, such as "decoder_". mask: None if the call leaves it out.
    """

    prefix: str
    mask: Tensor | None
    sequences: list[Tensor]


class Masks:
    """Finds masks among the arguments of the model's forward, and of its submodules'."""

    def __init__(self, model: nn.Module, mask: Mask | None) -> None:
        self._model, self._mask = model, mask
        self._names = _ALIASES.get(mask, (mask,)) if isinstance(mask, str) else ()
        self._parameters = {"": _parameters(model)}
        self.receivers: dict[str, nn.Module] = {}
        for name, module in model.named_modules():
            parameters = _parameters(module)
            if name and self._prefixes(parameters):
                self.receivers[name], self._parameters[name] = module, parameters

    def given(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], name: str = ""
    ) -> dict[str, Any]:
        """Return a call's arguments by name, of the model or a submodule, without those of None.

        Those in a dictionary (timm's NaFlexVit) are like the others.
        """
        named = dict(zip(self._parameters[name], args, strict=False)) | dict(kwargs)
        for value in list(named.values()):
            if type(value) is dict:
                named |= {key: part for key, part in value.items() if isinstance(key, str)}
        return {key: value for key, value in named.items() if value is not None}

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
        """Return which tokens count, as bool (samples, tokens); None if the call does not tell."""
        given = self.given(args, kwargs)
        if self._mask is None or isinstance(self._mask, str):
            mask = next((given[name] for name in self._names if name in given), None)
        else:
            mask = self._mask(given)
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            return None
        if mask.shape[0] != batch_size(self._model, args, kwargs):  # of tokens to tokens
            return None
        return mask if mask.dtype == torch.bool else mask != 0

    def is_single(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Tell whether the call gives one sequence, of words, and a mask for it; or can give none.

        Whatever has its shape then belongs to it.
        """
        given = self.given(args, kwargs)
        prefixes = self._prefixes((*self._parameters[""], *given))
        if self._mask is None or not (self.receivers or prefixes):
            return True
        counts = self.read(args, kwargs)
        if counts is None:
            return False
        return all(
            _family(key, prefixes) == "" and x.shape == counts.shape and not x.is_floating_point()
            for key, value in given.items()
            if self._prefix(key) is None and not (key == "labels" and "decoder_" not in prefixes)
            for x in tree_leaves(value)
            if isinstance(x, Tensor) and x.dim() > 1
        )

    def handed(
        self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Iterator[Handed]:
        """Yield the masks that a module (by name; "" is the model) is called with."""
        given = self.given(args, kwargs, name)
        prefixes = self._prefixes((*self._parameters[name], *given))
        if not name and not self._names:
            yield self._handed("", prefixes, given, self.read(args, kwargs))
        for prefix in sorted(prefixes):
            mask = next((given[key] for key in given if self._prefix(key) == prefix), None)
            if mask is None or (isinstance(mask, Tensor) and mask.dim() == 2):
                yield self._handed(prefix, prefixes, given, mask)

    def _handed(
        self, prefix: str, prefixes: set[str], given: Mapping[str, Any], mask: Tensor | None
    ) -> Handed:
        """Find what a mask is for: ids of its shape, or embeddings if there are none."""
        found = [
            tensor
            for key, value in given.items()
            if self._prefix(key) is None and _family(key, prefixes) == prefix
            for tensor in tree_leaves(value)
            if isinstance(tensor, Tensor)
            and (tensor.dim() in (2, 3) or key == "patches")
            and (mask is None or tensor.shape[:2] == mask.shape)
        ]
        if any(x.dim() == 2 and not x.is_floating_point() for x in found):
            found = [x for x in found if x.dim() == 2]
        return Handed(prefix, mask, found)

    def _prefixes(self, keys: Iterable[str]) -> set[str]:
        found = set()
        for key in keys:  # torch.compile reads no closures of a comprehension here
            prefix = self._prefix(key)
            if prefix is not None:
                found.add(prefix)
        return found

    def _prefix(self, key: str) -> str | None:
        """Return what stands before the mask's name in that of an argument; None: it is no mask."""
        for name in self._names:
            if key.endswith(name):
                return key[: -len(name)]
        return None


def counts_of(mask: Tensor) -> Tensor:
    """Return which tokens count by a mask of 0 and 1, or one that is added to scores."""
    if mask.dtype == torch.bool:
        return mask
    return mask >= 0 if mask.is_floating_point() and bool((mask < 0).any()) else mask != 0


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


def _family(key: str, prefixes: set[str]) -> str:
    """Return the prefix of the mask that is for an argument: that of the decoder for labels."""
    if key == "labels" and "decoder_" in prefixes:
        return "decoder_"
    return max((p for p in prefixes if key.startswith(p)), key=len, default="")


def _parameters(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the arguments of a module's forward, those by position first."""
    forward = module.forward
    return _names_of(getattr(forward, "__func__", forward), inspect.ismethod(forward))


@lru_cache(maxsize=4096)
def _names_of(function: Callable[..., Any], is_method: bool) -> tuple[str, ...]:
    try:
        parameters = list(inspect.signature(function).parameters.values())[is_method:]
    except ValueError:  # of a script module
        return ()
    star = next((p for p in parameters if p.kind == p.VAR_POSITIONAL), None)
    return tuple(
        # no argument by position goes beyond a star
        p.name
        for p in parameters
        if p.kind != p.VAR_KEYWORD and not (star and p.kind == p.KEYWORD_ONLY)
    )
