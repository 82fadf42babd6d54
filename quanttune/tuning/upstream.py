"""What the loss tells the observed tensors when its backward pass begins."""

from typing import Any

import torch
from torch import Tensor


class Upstream:
    """d(loss)/d(ratio / samples) of one instance of eq. 2, while a backward pass is under way.

    Otherwise it is 0. `coefficient` is one tensor all along: a compiled forward has saved it for
    its backward.
    """

    def __init__(self, like: Tensor) -> None:
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        self.coefficient = torch.zeros((), device=like.device, dtype=dtype)
        self._shares: dict[tuple[Any, ...], Tensor] = {}

    def publish(self, coefficient: Tensor) -> None:
        """Set the weight of an instance in the backward pass that begins."""
        self.coefficient.data.copy_(coefficient)  # autograd need not know of it
        self._shares.clear()

    def clear(self) -> None:
        """Forget the weight of the loss whose backward has ended."""
        self.coefficient.data.zero_()
        self._shares.clear()

    def share(self, multiplicity: int, statistics: Tensor) -> Tensor:
        """Return the gradient of the loss with respect to the ratio of each sample of a tensor."""
        samples, dtype = len(statistics), statistics.dtype
        key = multiplicity, samples, dtype, statistics.device
        if key not in self._shares:  # few differ, and a tensor operation costs as much as a kernel
            weight = self.coefficient.to(statistics.device, dtype) * (multiplicity / samples)
            self._shares[key] = weight.repeat(samples)
        return self._shares[key]
