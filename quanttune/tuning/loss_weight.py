"""What the loss tells the observed tensors when its backward pass begins."""

from typing import Any

import torch
from torch import Tensor

from ..reference import result_dtype


class Upstream:
    """d(loss)/d(ratio / samples) of one instance of eq. 2, while a backward pass is under way.

    Otherwise it is 0. `coefficient` is one tensor all along: a compiled forward has saved it for
    its backward.
    """

    def __init__(self, like: Tensor) -> None:
        self.coefficient = torch.zeros((), device=like.device, dtype=result_dtype(like))
        self._ratio_grads: dict[tuple[Any, ...], Tensor] = {}

    def publish(self, coefficient: Tensor) -> None:
        """Set the weight of an instance in the backward pass that begins."""
        self.coefficient.data.copy_(coefficient)  # autograd need not know of it
        self._ratio_grads.clear()

    def clear(self) -> None:
        """Forget the weight of the loss whose backward has ended."""
        self.coefficient.data.zero_()
        self._ratio_grads.clear()

    def ratio_grad(self, multiplicity: int, statistics: Tensor) -> Tensor:
        """Return the gradient of the loss with respect to the ratio of each sample of a tensor."""
        samples = len(statistics)
        key = multiplicity, samples, statistics.dtype, statistics.device
        # few differ, and a tensor operation costs as much as a kernel
        if key not in self._ratio_grads:
            weighed = _ratio_grad(self.coefficient, statistics, samples, multiplicity)
            self._ratio_grads[key] = weighed
        return self._ratio_grads[key]


def _ratio_grad(coefficient: Tensor, like: Tensor, samples: int, multiplicity: int) -> Tensor:
    weight = coefficient.to(like.device, result_dtype(like)) * (multiplicity / samples)
    return weight.repeat(samples)


# An op, and one that wants the gradient: what depends on a forward's inputs alone a compiler may
# compute in the forward, where the loss has not published its coefficient yet.
torch.library.define(
    "quanttune::ratio_grad",
    "(Tensor coefficient, Tensor grad, SymInt samples, int multiplicity) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.impl("quanttune::ratio_grad", "CompositeExplicitAutograd")(_ratio_grad)
torch.library.register_fake("quanttune::ratio_grad")(_ratio_grad)
traced_ratio_grad = torch.ops.quanttune.ratio_grad.default
