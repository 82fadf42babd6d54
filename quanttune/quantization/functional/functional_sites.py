"""Quantize what no module holds: attention, other products of activations, sums of the residual
stream, and products with parameters that no Linear holds.

While the model, or a part of it, is called, a TorchFunctionMode sees these operations. Each is
known by its place in the code of the module that calls it (places.py). Its quantizers belong to
that module, under the name of the operation and how many of its kind were met there before:
`add0_quantizer`, `attention0_query_quantizer`. What an operation is, calibration decides, by what
its tensors are made of (provenance.py); from then on its place tells.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..modules import QuantizedLinear, QuantizedModule
from ..parameters import RoundsParameters
from ..product_counts import Product
from ..scheme import Scheme
from .contractions import Contraction, contraction
from .iteration import children_of
from .modes import unwatch, watch
from .operations import CALLS, Call, Calls, Operation, call_under_way
from .provenance import ACTIVATION, Made, Provenance, tensors_in
from .scaled_dot_product import attention

SUMS = {torch.add, Tensor.add, Tensor.__add__, Tensor.__iadd__, Tensor.__radd__}


class FunctionalSites:
    """The functional sites of a model, which may find others until it is `frozen`."""

    def __init__(self, model: nn.Module, scheme: Scheme, device: torch.device) -> None:
        self.scheme, self.device = scheme, device
        self.frozen = False
        self.enabled = True
        self.round_weights = True  # those of sites that are found from now on
        self.modules = dict(model.named_modules())
        self.products: list[Product] = []  # of the first batch that it was calibrated with

    def watch(self, undo: ExitStack) -> None:
        """See what all modules call but those of PyTorch, and our own, that hold no others."""
        names = list(self.modules)
        for name, module in self.modules.items():
            prefix = f"{name}." if name else ""
            is_childless = not any(n != name and n.startswith(prefix) for n in names)
            is_known = type(module).forward.__module__.startswith("torch.nn.")
            if isinstance(module, QuantizedModule) or (is_childless and is_known):
                continue
            undo.callback(module.__dict__.pop, CALLS, None)
            module.__dict__[CALLS] = Calls(name, is_childless)
            undo.callback(unwatch, module)
            watch(module, self)

    def calls(self) -> Iterator[tuple[nn.Module, Calls]]:
        """Return the modules that are watched, and what they call."""
        for module in self.modules.values():
            if calls := module.__dict__.get(CALLS):
                yield module, calls

    def mode(self, inputs: Any) -> AbstractContextManager[Any]:
        """Return what sees the operations of an outermost call, which has these arguments."""
        if not self.enabled:
            return nullcontext()
        if self.frozen or torch.compiler.is_dynamo_compiling():
            return _Mode(self, None)
        modules = self.modules.values()
        buffers = [b for m in modules for b in m._buffers.values() if b is not None]
        holders: list[Any] = [m for m in modules if isinstance(m, RoundsParameters)]
        rounded = [m._parameters[name] for m in holders for name in m.rounded]
        return _Mode(self, Provenance(inputs, buffers, [p for p in rounded if p is not None]))

    def register(self, module: nn.Module, way: str, operation: Operation) -> Operation:
        """Note what an operation is, and give its module the quantizers that the scheme covers."""
        calls: Calls = module.__dict__[CALLS]
        calls.operations[way] = operation
        for part, kind in operation.kinds.items() if operation.name else ():
            attribute = operation.quantizer(part)
            site = f"{calls.module}.{attribute}".lstrip(".")
            if kind == "weight":
                weights: Any = self.scheme.weight_quantizer(site, 0)
                weights.enabled = self.round_weights
                children_of(module)[attribute] = weights
            elif kind in self.scheme.kinds:
                quantizer = self.scheme.activation_quantizer(site, kind, self.device)
                children_of(module)[attribute] = quantizer
        return operation

    def decide(self, call: Call, stem: str, kinds: dict[str, str], **more: Any) -> Operation:
        """Let an operation be rounded."""
        operation = Operation(call.calls.next_name(stem), kinds, **more)
        return self.register(call.module, call.way, operation)

    def leave(self, module: nn.Module, operation: Operation) -> None:
        """Leave a sum in float that turned out to go into a softmax."""
        if operation.name:
            children_of(module).pop(operation.quantizer(""), None)
        operation.name, operation.kinds, operation.is_score = None, {}, True

    def owner_of(self, weight: Tensor, caller: nn.Module) -> str | None:
        """Return the name of the quantized Linear that holds a parameter, below who calls it."""
        for name, module in caller.named_modules():
            if isinstance(module, QuantizedLinear) and module.weight is weight:
                return name
        return None

    def name_of(self, weight: Tensor) -> str | None:
        """Return the name of the parameter that a weight is, or is a view of."""
        storage = weight.untyped_storage().data_ptr()
        parameters = self.modules[""].named_parameters()
        return next((n for n, p in parameters if p.untyped_storage().data_ptr() == storage), None)


class _Mode(TorchFunctionMode):
    """Rounds what the operations of a call multiply or add."""

    def __init__(self, sites: FunctionalSites, made: Provenance | None) -> None:
        super().__init__()
        self.sites = sites
        self.made = made  # None once the sites are frozen

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        if func in SUMS and _adds_matrices(args):
            return self._sum(func, args, kwargs)
        found = contraction(func, args, kwargs)
        if found is not None:
            return self._product(func, args, kwargs, found)
        result = func(*args, **kwargs)
        self._follow(func, args, kwargs, result)
        return result

    def _follow(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        # what the model itself compiles, such as flex_attention, is not followed inside
        if self.made is not None and not torch.compiler.is_dynamo_compiling():
            self.made.follow(func, args, kwargs, result)

    def _attention(self, *args: Any, **kwargs: Any) -> Tensor:
        call = call_under_way(self.sites.modules)
        operation = call.operation(is_settled=self.made is None)
        if call.is_apart:
            return F.scaled_dot_product_attention(*args, **kwargs)
        if operation is None and self.made is None:
            raise call.refusal("computes attention")
        if operation is None:
            kinds = dict.fromkeys(("query", "key", "value"), "operand")
            kinds |= {"score": "score", "probability": "probability"}
            operation = self.sites.decide(call, "attention", kinds)
        # to spell it out takes time and, in training, memory for every score
        is_float = torch.is_grad_enabled() and not call.is_rounded(operation)
        if is_float and not torch.compiler.is_compiling():
            result = F.scaled_dot_product_attention(*args, **kwargs)
        else:
            result = attention(partial(call.round, operation), *args, **kwargs)
        if self.made is not None:
            self.made.enter_softmax(args[3] if len(args) > 3 else kwargs.get("attn_mask"))
            self.made.mark(result, ACTIVATION)
        return result

    def _sum(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        call = call_under_way(self.sites.modules)
        operation = call.operation(is_settled=self.made is None)
        if self.made is not None and not call.is_apart:
            # before func, which may change its arguments
            operation = self._judged_sum(call, operation, args[0], args[1])
        elif operation is None and not call.is_apart and _looks_residual(*args[:2]):
            raise call.refusal("adds activations")
        result = func(*args, **kwargs)
        self._follow(func, args, kwargs, result)
        if operation is None or operation.name is None:
            return result
        rounded = call.round(operation, "", result)
        if self.made is not None:
            self.made.mark(rounded, ACTIVATION)
            self.made.expect(rounded, partial(self.sites.leave, call.module, operation))
        return rounded

    def _judged_sum(self, call: Call, known: Operation | None, a: Tensor, b: Tensor) -> Operation:
        if known is not None and (known.name or known.is_score):
            return known
        assert self.made is not None
        if self.made.is_residual(a, b) and not _is_a_function_of_one_tensor(call):
            return self.sites.decide(call, "add", {"": "residual"})
        return known or self.sites.register(call.module, call.way, Operation())

    def _product(self, func: Callable[..., Any], args: Any, kwargs: Any, found: Contraction) -> Any:
        call = call_under_way(self.sites.modules)
        operation = call.operation(is_settled=self.made is None)
        if call.is_apart:
            operation = None
        elif self.made is not None:
            operation = self._judged_product(call, operation, found)
        elif operation is None and _are_no_parameters(found.operands):
            raise call.refusal("multiplies activations")
        if operation is None or operation.name is None:
            result = func(*args, **kwargs)
            self._follow(func, args, kwargs, result)
            return result
        result = _rounded_product(call, operation, found)
        if self.made is not None:
            self.made.mark(
                result, ACTIVATION | (Made.SCORE if "score" in operation.kinds else Made(0))
            )
        return result

    def _judged_product(
        self, call: Call, known: Operation | None, found: Contraction
    ) -> Operation | None:
        if known is not None and known.name:
            return known
        assert self.made is not None
        weight = self.made.weight_among(*found.operands)
        if weight is not None:
            return self._new_linear(call, weight, found)
        if self.made.is_product(*found.operands):
            kinds = {
                part: "probability" if Made.PROBABILITY in self.made.of(x) else "operand"
                for part, x in zip(("left", "right"), found.operands, strict=True)
            }
            if "probability" not in kinds.values():
                kinds["score"] = "score"
            return self.sites.decide(call, "product", kinds)
        return known or self.sites.register(call.module, call.way, Operation())

    def _new_linear(self, call: Call, which: int, found: Contraction) -> Operation:
        assert self.made is not None
        weight = found.operands[which]
        kinds = {"input": "input", "output": "output"}
        if found.is_linear and (owner := self.sites.owner_of(weight, call.module)) is not None:
            return self.sites.decide(call, "linear", {}, weight=which, owner=owner)
        parameter = None
        if Made.ROUNDED not in self.made.of(weight):
            kinds["weight"] = "weight"
            parameter = self.sites.name_of(weight)
        return self.sites.decide(call, "linear", kinds, weight=which, parameter=parameter)


def _rounded_product(call: Call, operation: Operation, found: Contraction) -> Tensor:
    """Multiply what the quantizers of an operation leave of its operands."""
    operands = list(found.operands)
    if operation.owner is not None:
        owner: Any = call.module.get_submodule(operation.owner)
        return owner.multiply(operands[0], found.bias)  # type: ignore[no-any-return]
    if operation.weight is None:
        operands = [
            call.round(operation, part, x)
            for part, x in zip(("left", "right"), operands, strict=True)
        ]
        product = call.round(operation, "score", found.again(*operands))
        return product if found.add is None else found.add(product)
    which = operation.weight
    operands[1 - which] = call.round(operation, "input", operands[1 - which])
    quantizer = call.quantizer(operation, "weight")
    if quantizer is not None:
        operands[which] = found.round_weight(which, quantizer)
    product = found.again(*operands)
    return call.round(operation, "output", product if found.add is None else found.add(product))


def _is_a_function_of_one_tensor(call: Call) -> bool:
    """Tell whether a module without others maps one tensor, as activation functions do."""
    if call.arguments is None or not call.calls.is_childless:
        return False
    return sum(x.is_floating_point() for x in tensors_in(call.arguments)) == 1


def _adds_matrices(args: Any) -> bool:
    return len(args) > 1 and all(
        isinstance(x, Tensor) and x.is_floating_point() and x.dim() > 1 for x in args[:2]
    )


def _looks_residual(a: Tensor, b: Tensor) -> bool:
    """Tell what a sum may be that calibration has not met, by its tensors alone."""
    return a.shape == b.shape and _are_no_parameters((a, b))


def _are_no_parameters(tensors: Iterable[Tensor]) -> bool:
    return not any(isinstance(x, nn.Parameter) for x in tensors)
