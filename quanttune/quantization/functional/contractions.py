"""The operations that multiply two tensors, each with what it multiplies and sums over."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Contraction:
    """A call of an operation on two tensors: which they are, and along which they are summed."""

    operands: tuple[Tensor, Tensor]
    summed: tuple[Sequence[int], Sequence[int]]  # dimensions of each
    again: Callable[[Tensor, Tensor], Tensor]  # the same call with others in their place
    add: Callable[[Tensor], Tensor] | None = None  # what baddbmm and the like do with the product
    is_linear: bool = False  # F.linear, with a weight of (outputs, inputs)
    bias: Tensor | None = None

    def round_weight(self, which: int, quantizer: Callable[[Tensor], Tensor]) -> Tensor:
        """Round an operand that is a weight, its outputs along the first dimension meanwhile."""
        weight, summed = self.operands[which], self.summed[which]
        last = range(-len(summed), 0)
        rows = weight.movedim(tuple(summed), tuple(last))
        outputs = rows.shape[: rows.dim() - len(summed)]
        rounded = quantizer(rows.reshape(outputs.numel(), -1))
        return rounded.view(rows.shape).movedim(tuple(last), tuple(summed))


def contraction(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Contraction | None:
    """Read a call; None if it multiplies no two floating point tensors."""
    if func not in _READERS:
        return None
    found = _READERS[func](func, args, kwargs)
    if found is None or not all(_is_floating(x) for x in found.operands):
        return None
    return found


def _product(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Contraction | None:
    a, b, rest = _two(args, kwargs, ("other", "mat2"))
    if not isinstance(b, Tensor):
        return None
    summed = (-1,), (-2 if b.dim() > 1 else -1,)
    return Contraction((a, b), summed, lambda a, b: func(a, b, **rest))


def _reversed_product(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Contraction | None:
    b, a = args
    return _product(torch.matmul, (a, b), kwargs)


def _linear(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Contraction:
    x, weight, *bias = args if len(args) > 1 else (*args, kwargs["weight"])
    last = bias[0] if bias else kwargs.get("bias")
    summed = (-1,), (-1,)
    return Contraction(
        (x, weight), summed, lambda x, weight: F.linear(x, weight, last), is_linear=True, bias=last
    )


def _added(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Contraction | None:
    """baddbmm, addmm and addbmm: beta * input + alpha * product."""
    names = ("batch1", "batch2") if "batch1" in kwargs or "batch2" in kwargs else ("mat1", "mat2")
    values = [*args, *(kwargs[name] for name in names if name in kwargs)]
    if len(values) != 3:
        return None
    x, a, b = values
    beta, alpha = kwargs.get("beta", 1), kwargs.get("alpha", 1)

    def add(product: Tensor) -> Tensor:
        product = product if alpha == 1 else product * alpha
        return product if beta == 0 else product + (x if beta == 1 else x * beta)

    return Contraction((a, b), ((-1,), (-2,)), torch.matmul, add)


def _grouped(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Contraction | None:
    a, b, *rest = args
    return Contraction((a, b), ((-1,), (-2,)), lambda a, b: func(a, b, *rest, **kwargs))


def _einsum(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Contraction | None:
    equation, *operands = args
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = list(operands[0])
    if not isinstance(equation, str) or len(operands) != 2 or "." in equation:
        return None
    left, _, result = equation.replace(" ", "").partition("->")
    labels = left.split(",")
    shared = [label for label in labels[0] if label in labels[1] and label not in result]
    if not shared or len(labels) != 2:
        return None
    summed = tuple([names.index(label) for label in shared] for names in labels)
    return Contraction(
        (operands[0], operands[1]),
        (summed[0], summed[1]),
        lambda a, b: torch.einsum(equation, a, b),
    )


def _two(
    args: Sequence[Any], kwargs: dict[str, Any], names: Sequence[str]
) -> tuple[Any, Any, dict[str, Any]]:
    rest = dict(kwargs)
    a = args[0] if args else rest.pop("input", None)
    b = args[1] if len(args) > 1 else next((rest.pop(n) for n in names if n in rest), None)
    return a, b, rest


def _is_floating(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point() and x.dim() > 0


_READERS: dict[Any, Any] = {
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__), _product),
    **dict.fromkeys((torch.bmm, Tensor.bmm, torch.mm, Tensor.mm), _product),
    Tensor.__rmatmul__: _reversed_product,
    F.linear: _linear,
    torch.einsum: _einsum,
    **dict.fromkeys((torch.baddbmm, Tensor.baddbmm, torch.addmm, Tensor.addmm), _added),
    torch._grouped_mm: _grouped,
    **({F.grouped_mm: _grouped} if hasattr(F, "grouped_mm") else {}),
}
