"""Which operations leave features apart that are rotated: they move, repeat or scale them."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def _called(*names: str) -> set[Any]:
    return {getattr(owner, n) for owner in (torch, Tensor) for n in names if hasattr(owner, n)}


# the same on labels, which tell where each element came from
MOVES = _called(
    "view", "reshape", "flatten", "unflatten", "permute", "transpose", "movedim", "swapaxes",
    "roll", "flip", "expand", "expand_as", "repeat", "repeat_interleave", "unsqueeze", "squeeze",
    "chunk", "split", "tensor_split", "unbind", "select", "narrow", "__getitem__", "view_as", "t",
)  # fmt: skip
MOVES |= {getattr(Tensor, name).__get__ for name in ("T", "mT")}
# every element stays where it is
CASTS = _called(
    "to", "float", "double", "half", "bfloat16", "type", "type_as", "contiguous", "clone", "detach",
    "dropout",
) | {F.dropout}  # fmt: skip
SCALES = _called("mul", "mul_", "multiply", "div", "div_", "true_divide") | {
    Tensor.__mul__, Tensor.__rmul__, Tensor.__imul__, Tensor.__truediv__, Tensor.__itruediv__
}  # fmt: skip
# what comes of these holds nothing of what they are given
CREATES = _called(
    "new_ones", "new_zeros", "new_empty", "new_full", "new_tensor", "ones_like", "zeros_like",
    "empty_like", "full_like",
)  # fmt: skip
MEANS = _called("mean")
PRODUCTS = _called("matmul", "bmm") | {Tensor.__matmul__}


def is_number(x: Any) -> bool:
    """Tell whether x is the same factor for every element."""
    return isinstance(x, (int, float)) or (isinstance(x, Tensor) and x.numel() == 1)


def compact(labels: Tensor) -> Tensor:
    """Return labels without what `expand` repeated."""
    for axis, stride in enumerate(labels.stride()):
        if stride == 0 and labels.shape[axis]:
            labels = labels.narrow(axis, 0, 1)
    return labels
