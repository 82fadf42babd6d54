"""Quantize what no module holds: the products of attention and the sums of the residual stream.

While the model, or a part of it, is called, a TorchFunctionMode sees these operations. Their
quantizers belong to the module that calls, under the name of the operation and how many of its kind
came before in that call: `add0_quantizer`, `attention0_query_quantizer`.
"""

import threading
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from .scheme import Scheme

_PRODUCTS = {torch.matmul, torch.bmm, Tensor.matmul, Tensor.bmm, Tensor.__matmul__}
_SUMS = {torch.add, Tensor.add, Tensor.__add__, Tensor.__iadd__}
_SOFTMAX = {torch.softmax, Tensor.softmax, F.softmax}
_KEEPERS = {
    F.dropout,
    torch.dropout,
    Tensor.to,
    Tensor.type_as,
}  # what these return is still a softmax


class FunctionalSites:
    """The functional sites of a model; their quantizers are made when a site is first reached."""

    def __init__(
        self, model: nn.Module, scheme: Scheme, device: torch.device, undo: ExitStack
    ) -> None:
        self.scheme, self.device = scheme, device
        self.frozen = False
        self.enabled = True
        self._names = {module: name for name, module in model.named_modules()}
        self._leaves = {module for module in self._names if not any(module.children())}
        handles = []
        for module in self._names:
            handles.append(module.register_forward_pre_hook(self._push))
            handles.append(module.register_forward_hook(self._pop, always_call=True))
        for handle in handles:
            undo.callback(handle.remove)

    def quantize(self, kind: str, site: str, x: Tensor) -> Tensor:
        """Round x, or let it pass if it is not covered."""
        if kind not in self.scheme.kinds:
            return x
        module, _ = _here.forwards[id(self)].calls[-1]
        name = f"{site}_quantizer"
        if not hasattr(module, name):
            where = f"{self._names[module]}.{name}".lstrip(".")
            if self.frozen:
                raise RuntimeError(f"{where} was never reached during calibration: give more data")
            self.add(module, where, kind)
        return getattr(module, name)(x)

    def add(self, module: nn.Module, site: str, kind: str | None) -> None:
        """Give a module the quantizer of an operation that it calls."""
        quantizer = self.scheme.activation_quantizer(site, kind, self.device)
        module.add_module(site.rpartition(".")[2], quantizer)

    def number(self, operation: str) -> str:
        """Name an operation of the current module call: add0, add1, ..."""
        _, counts = _here.forwards[id(self)].calls[-1]
        counts[operation] += 1
        return f"{operation}{counts[operation] - 1}"

    @property
    def in_leaf(self) -> bool:
        """Whether the call comes from a module without children, such as an activation function."""
        return _here.forwards[id(self)].calls[-1][0] in self._leaves

    def _push(self, module: nn.Module, _: Any) -> None:
        # the outermost call is the model, or a part that activation checkpointing runs again
        if id(self) not in _here.forwards:
            _here.forwards[id(self)] = _Forward(_Mode(self) if self.enabled else nullcontext())
            _here.forwards[id(self)].mode.__enter__()
        _here.forwards[id(self)].calls.append((module, Counter()))

    def _pop(self, *_: Any) -> None:
        forward = _here.forwards[id(self)]
        forward.calls.pop()
        if not forward.calls:
            del _here.forwards[id(self)]
            forward.mode.__exit__(None, None, None)


class _Mode(TorchFunctionMode):
    def __init__(self, sites: FunctionalSites) -> None:
        super().__init__()
        self.sites = sites
        self.probabilities = WeakTensorKeyDictionary()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and not self.sites.in_leaf:
            return self._attention(*args, **kwargs)
        if func in _PRODUCTS and self._are_activations(args[:2]) and not self.sites.in_leaf:
            return self._product(func, *args, **kwargs)
        result = func(*args, **kwargs)
        if func in _SOFTMAX or (func in _KEEPERS and args[0] in self.probabilities):
            self.probabilities[result] = True
        elif func in _SUMS and self._is_residual(args) and not self.sites.in_leaf:
            return self.sites.quantize("residual", self.sites.number("add"), result)
        return result

    def _product(self, func: Callable[..., Tensor], a: Tensor, b: Tensor, **kwargs: Any) -> Tensor:
        site = self.sites.number("product")
        after_softmax = a in self.probabilities
        a = self.sites.quantize("probability" if after_softmax else "operand", f"{site}_left", a)
        product = func(a, self.sites.quantize("operand", f"{site}_right", b), **kwargs)
        if after_softmax:
            return product
        return self.sites.quantize("score", f"{site}_score", product)

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Spell out scaled_dot_product_attention, to quantize what it multiplies."""
        site, quantize = self.sites.number("attention"), self.sites.quantize
        # before it is rounded, where there are fewer values than scores
        query = query * (query.shape[-1] ** -0.5 if scale is None else scale)
        query = quantize("operand", f"{site}_query", query)
        key = quantize("operand", f"{site}_key", key)
        value = quantize("operand", f"{site}_value", value)
        if enable_gqa:
            groups = query.shape[-3] // key.shape[-3]
            key, value = (x.repeat_interleave(groups, -3) for x in (key, value))
        scores = quantize("score", f"{site}_score", query @ key.transpose(-2, -1))
        if is_causal:
            seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
            scores = scores.masked_fill(~seen, -torch.inf)
        if attn_mask is not None:
            if attn_mask.dtype == torch.bool:
                scores = scores.masked_fill(~attn_mask, -torch.inf)
            else:
                scores = scores + attn_mask
        probability = F.dropout(scores.softmax(-1), dropout_p)
        return quantize("probability", f"{site}_probability", probability) @ value

    @staticmethod
    def _are_activations(tensors: Any) -> bool:
        return len(tensors) == 2 and all(
            isinstance(x, Tensor) and x.is_floating_point() and not isinstance(x, nn.Parameter)
            for x in tensors
        )

    def _is_residual(self, args: Any) -> bool:
        """Tell whether two activations of one shape are added, or of one for all samples.

        The latter, such as embeddings of positions, must be the same site in a batch of one.
        """
        if not self._are_activations(args[:2]):
            return False
        one, other = args[0].shape, args[1].shape
        of_all = len(one) == len(other) == 3 and one[1:] == other[1:] and 1 in (one[0], other[0])
        return len(one) > 1 and (one == other or of_all)


@dataclass
class _Forward:
    """A call of a model that is under way: the modules in it that are being called."""

    mode: AbstractContextManager[Any]
    calls: list[tuple[nn.Module, Counter[str]]] = field(default_factory=list)


class _Here(threading.local):
    """What is under way in this thread, by the id of the sites; others may call the model too."""

    def __init__(self) -> None:
        self.forwards: dict[int, _Forward] = {}


_here = _Here()
