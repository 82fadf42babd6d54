"""Which Linear modules read which norms, found by watching one batch on its way."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from ...modules import (
    QuantizedConvolution,
    QuantizedEmbedding,
    QuantizedModule,
    holds,
    quantized_class_of,
)
from ...restoration import NAME
from ...running import Data, forward_batches
from .norms import Norm, may_normalize, norm_of
from .pairs import Pair

Watch = TypeVar("Watch", bound=Any)  # a TorchFunctionMode that has handles()

_NAMES = "view", "reshape", "flatten", "permute", "transpose", "contiguous", "roll"
# what these return still holds channels apart, if labels that go through them say so
_MOVERS = {getattr(owner, n) for owner in (torch, Tensor) for n in _NAMES if hasattr(owner, n)}
_MOVERS |= {F.pad, F.dropout, torch.dropout}
_FACTS = (bool, int, str, torch.Size, torch.dtype, torch.device)  # of a tensor, not of its values


def find_pairs(model: nn.Module, data: Data) -> list[Pair]:
    """Run a float model on the first batch and return the pairs in it.

    What cannot be changed is left alone, with a warning that names it.

    Raises:
        ValueError: there is no batch, or no pair.
    """
    pairs = pairs_in(model, data)
    if not pairs:
        raise ValueError(
            f"{type(model).__name__} has no norm whose output a Linear module reads, so there is "
            "nothing to equalize"
        )
    return pairs


def pairs_in(model: nn.Module, data: Data) -> list[Pair]:
    """Do what `find_pairs` does, and return none where there are none; the model may be quantized.

    That of a quantized model has to compute in float meanwhile.
    """
    return watched(model, data, _Watch(model)).pairs()


def find_other_readers(model: nn.Module, data: Data) -> dict[str, Any]:
    """Run a float model on the first batch and return the Linear modules that read no norm.

    Those that read an RMSNorm beside others are there too, for it cannot be changed. Modules
    without a weight of their own are left alone.

    Raises:
        ValueError: there is no batch, or no such module.
    """
    others = watched(model, data, _Watch(model)).others()
    if not others:
        raise ValueError(
            f"{type(model).__name__} has no Linear module with a weight of its own that reads "
            "something else than a norm, so there is no input to smooth"
        )
    return others


def watched(model: nn.Module, data: Data, watch: Watch) -> Watch:
    """Run a float model on the first batch under a mode that has hooks, and return it.

    Raises:
        ValueError: there is no batch.
    """
    with ExitStack() as undo:
        for handle in watch.handles():
            undo.callback(handle.remove)
        undo.enter_context(watch)
        if not forward_batches(model, islice(data.batches, 1), data.mask):
            raise ValueError("data is empty: calibration needs at least one batch of inputs")
    return watch


class _Watch(TorchFunctionMode):
    """Follow what norms return through a forward of the model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model
        self._names = {module: name for name, module in model.named_modules()}
        self._norms: dict[nn.Module, Norm] = {}
        self._outputs = WeakTensorKeyDictionary()  # of norms, with the tensor's version
        self._inside: list[nn.Module] = []  # norms and readers that are being called
        self._read: dict[nn.Module, set[nn.Module | None]] = {}  # which norms by reader
        self._leaks: set[Any] = set()  # norms that something else reads
        owners = [(p, m) for m in self._names for p in m.parameters(recurse=False)]
        self._owners = dict(owners)
        # modules whose parameters others use
        self._shared: set[Any] = {module for p, module in owners if self._owners[p] is not module}
        self._shared |= {self._owners[p] for p, module in owners if module in self._shared}

    def handles(self) -> Iterator[RemovableHandle]:
        """Register hooks."""
        for module in self._names:
            if may_normalize(module):
                yield module.register_forward_pre_hook(self._enter)
                yield module.register_forward_hook(self._leave_norm)
            elif can_read(module):
                yield module.register_forward_pre_hook(self._enter_reader, with_kwargs=True)
                yield module.register_forward_hook(self._leave)
        yield self._model.register_forward_hook(self._end)

    def pairs(self) -> list[Pair]:
        """Return what was found, and warn of what must be left alone."""
        found = [self._pair(norm) for norm in self._names if may_normalize(norm)]
        read = {m for pair in found if pair for m in pair.readers.values()}
        left = [
            self._names[m] for m, norms in self._read.items() if norms != {None} and m not in read
        ]
        if left:
            some = ", ".join(left[:5])
            warnings.warn(
                f"{len(left)} module(s) that read a norm are not equalized: {some}. It has no "
                "weight, they share parameters, they read something else too, or it is an RMSNorm "
                "that others read",
                stacklevel=4,
            )
        return [pair for pair in found if pair]

    def others(self) -> dict[str, Any]:
        """Return the modules that read something else than pairs' norms, by name."""
        fixed = {n for n in self._norms if not isinstance(n, nn.LayerNorm) and not self._pair(n)}
        return {
            self._names[module]: module
            for module, norms in self._read.items()
            if norms <= {None, *fixed} and module not in self._shared
        }

    def _pair(self, norm: Any) -> Pair | None:
        if hasattr(norm, NAME):  # an equalization was here before
            readers, alone = norm.restoration.readers, False
        else:
            touching = [module for module, norms in self._read.items() if norm in norms]
            readers = [m for m in touching if self._read[m] == {norm} and m not in self._shared]
            alone = len(readers) == len(touching) and norm not in self._leaks
        if not readers or norm.weight is None or norm in self._shared:
            return None
        if not alone and not isinstance(norm, nn.LayerNorm):
            return None  # a Restoration is for what is rounded behind a norm
        known = self._norms.get(norm, Norm(norm, centers=True))
        return Pair(self._names[norm], known, {self._names[m]: m for m in readers}, alone)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        norms: set[Any] = {self._norm_of(x) for x in tensors} - {
            None
        }  # before func changes one in place
        result = func(*args, **kwargs)
        current = self._inside[-1] if self._inside else None
        self._shared |= {self._owners.get(x) for x in tensors} - {None, current}
        if not norms or current in self._read or _tells_facts(result):
            return result
        moves = func in _MOVERS and args and len(tensors) == 1
        if moves and _keeps_channels(func, args, kwargs):
            self._follow(result, norms.pop())
        else:
            self._leaks |= norms
        return result

    def _follow(self, x: Tensor, norm: nn.Module) -> None:
        self._outputs[x] = norm, x._version

    def _norm_of(self, x: Any) -> nn.Module | None:
        """Return the norm that returned x, if nothing changed it in place."""
        norm, version = self._outputs.get(x, (None, 0)) if isinstance(x, Tensor) else (None, 0)
        return norm if norm is not None and x._version == version else None

    def _enter(self, module: nn.Module, _: Any) -> None:
        self._inside.append(module)

    def _enter_reader(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._inside.append(module)
        self._read.setdefault(module, set()).add(self._norm_of(args[0]) if args else None)
        self._leaks |= {self._norm_of(x) for x in kwargs.values()}  # no hook of ours reads these

    def _leave(self, *_: Any) -> None:
        self._inside.pop()

    def _leave_norm(self, module: Any, args: tuple[Any, ...], output: Tensor) -> None:
        found = norm_of(module, args[0], output) if args and not hasattr(module, NAME) else None
        if found:
            self._norms[module] = found
            self._follow(output, module)
        self._inside.pop()  # last, since what uses its parameters outside of it is watched

    def _end(self, _: nn.Module, __: Any, output: Any) -> None:
        self._leaks |= {self._norm_of(leaf) for leaf in tree_leaves(output)}


def can_read(module: nn.Module) -> bool:
    """Tell whether a module multiplies its input with a weight of (outputs, channels)."""
    is_quantized = isinstance(module, QuantizedModule)
    quantized = type(module) if is_quantized else quantized_class_of(module)
    if quantized is None or not holds(module):
        return False
    return not issubclass(quantized, (QuantizedConvolution, QuantizedEmbedding))


def _tells_facts(result: Any) -> bool:
    return all(isinstance(leaf, _FACTS) for leaf in tree_leaves(result))


def _keeps_channels(func: Callable[..., Any], args: Any, kwargs: Any) -> bool:
    """Tell whether func leaves what is in the last dimension there, by moving labels about."""
    x, *others = args
    wanted = torch.arange(x.shape[-1], device=x.device)
    labels = torch.empty_like(x, dtype=wanted.dtype).copy_(wanted)  # with the strides of x
    moved = func(labels, *others, **kwargs)
    return moved.shape[-1:] == x.shape[-1:] and bool((moved == wanted).all())
