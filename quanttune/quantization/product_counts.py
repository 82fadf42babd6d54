"""How much of what a model multiplies is products of integers, and where the others stand."""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.utils._python_dispatch import TorchDispatchMode

from .functional.modes import class_of
from .functional.operations import CALLS
from .modules import QuantizedModule
from .quantizer import ActivationQuantizer, WeightQuantizer

COVERED = "the coverage or an override leaves it"  # why a product that is known is one of floats
UNSEEN = "no Linear, attention or product that is known computes it"
_QUANTIZERS = ActivationQuantizer, WeightQuantizer
_FUSED_ON_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


@dataclass
class Product:
    """A product at one place of a model: its share of all multiplications, and why it is float."""

    name: str
    share: float
    reason: str  # "" where both of its operands are integers


class _Counter(TorchDispatchMode):
    """Counts the multiplications of every operation of PyTorch, by where in the model they are."""

    def __init__(self) -> None:
        super().__init__()
        # where Triton is missing the import says so
        from torch.utils.flop_counter import flop_registry, sdpa_flop_count

        self.counters = flop_registry
        self.count_attention = sdpa_flop_count
        self.counts: dict[tuple[Any, str], int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        packet = getattr(func, "_overloadpacket", None)
        if packet is _FUSED_ON_CPU:
            count = self.count_attention(*(x.shape for x in args[:3]))
        elif packet in self.counters:
            count = self.counters[packet](*args, **kwargs, out_val=result)
        else:
            return result
        key = _where(sys._getframe(1))
        if not isinstance(key[0], ParametrizationList):  # what computes a weight is no product of x
            self.counts[key] = self.counts.get(key, 0) + count
        return result


@contextmanager
def counting_products(model: nn.Module) -> Iterator[list[Product]]:
    """Yield what holds, at the end, the products of the forwards in between, largest first."""
    found: list[Product] = []
    with _Counter() as counter:
        yield found
    names: dict[Any, str] = {module: name for name, module in model.named_modules()}
    total = sum(counter.counts.values())
    for (where, reason), count in sorted(counter.counts.items(), key=lambda item: -item[1]):
        found.append(Product(names.get(where) or str(where), count / total, reason))


def _where(frame: FrameType | None) -> tuple[Any, str]:
    """Return where an operation stands, and why it does not multiply integers."""
    while frame is not None:
        variables, name = frame.f_locals, frame.f_globals.get("__name__", "")
        module: Any = variables.get("self")
        if isinstance(module, ParametrizationList):
            return module, ""
        if isinstance(module, QuantizedModule):
            return module, _reason(module, ("input_quantizer", "weight_quantizer"))
        if name.startswith("quanttune.quantization.") and frame.f_code.co_name in _PRODUCTS:
            return _PRODUCTS[frame.f_code.co_name](variables)
        if isinstance(module, nn.Module) and CALLS in module.__dict__:
            return f"{module.__dict__[CALLS].module} ({class_of(module).__name__})".strip(), UNSEEN
        frame = frame.f_back
    return "outside of the model's modules", UNSEEN


def _of_attention(variables: Mapping[str, Any]) -> tuple[str, str]:
    round = variables["round"]  # of a Call, with its Operation
    parts = ("probability", "value") if "probability" in variables else ("query", "key")
    return _of_operation({"call": round.func.__self__, "operation": round.args[0]}, parts)


def _of_operation(
    variables: Mapping[str, Any], parts: Sequence[str] | None = None
) -> tuple[str, str]:
    call, operation = variables["call"], variables["operation"]
    if parts is None and operation.weight is None:
        parts = ("left", "right")
    elif parts is None:  # a weight that has no quantizer here is rounded by its module
        parts = ("input", *(part for part in ("weight",) if part in operation.kinds))
    name = f"{call.calls.module}.{operation.name}".lstrip(".")
    return name, _reason(call.module, [operation.quantizer(part) for part in parts])


_PRODUCTS = {"attention": _of_attention, "_rounded_product": _of_operation}


def _reason(module: Any, quantizers: Iterable[str]) -> str:
    missing = [n for n in quantizers if not isinstance(getattr(module, n, None), _QUANTIZERS)]
    return f"{COVERED} without {missing[0]}" if missing else ""
