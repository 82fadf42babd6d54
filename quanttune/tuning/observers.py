"""Hooks that observe every site of a forward pass, and what they know of it.

An observed tensor passes through `_Tap`: the model goes on with a view of the same storage, and the
tap's backward adds the gradient of the outlier loss to the one that comes in, in a single pass. How
much of it, the combined loss says when its own backward starts (loss.py). Nothing here holds a
graph, so gradient accumulation, loss scaling and both kinds of activation checkpointing need no
bookkeeping: a tap that a checkpoint recomputes finds the coefficient published already.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from .. import ops
from ..reference import RATIO


@dataclass(eq=False)
class Observation:
    """One distinct tensor of a forward pass, and how many instances of eq. 2 it stands for."""

    site: str
    module: nn.Module
    version: int  # of the tensor's storage: a change in place makes another tensor of it
    recomputed: bool  # by a checkpoint, during backward
    graph: bool  # made with gradients; a reentrant checkpoint first runs its region without
    multiplicity: int = 1
    statistics: Tensor | None = None  # of each sample, without a graph
    awaits_gradient: bool = False

    @property
    def ratio(self) -> Tensor:
        """The terms of eq. 2, of shape (samples,)."""
        assert self.statistics is not None
        return self.statistics[:, RATIO]


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, samples: int, observation: Observation, observers: "Observers"
    ) -> Tensor:
        statistics = ops.outlier_statistics(x, samples, observers.exact)
        ctx.save_for_backward(x, statistics)
        ctx.observation, ctx.observers = observation, observers
        observation.statistics = statistics
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, statistics = ctx.saved_tensors
        observation, observers = ctx.observation, ctx.observers
        observation.awaits_gradient = False
        share = observers.share(observation.multiplicity, statistics)
        total = ops.outlier_statistics_backward(
            grad, x, statistics, share, observers.exact, observers.detach_deviation
        )
        return total, None, None, None


class Observers:
    """The hooks on a model's sites, and the observations since they were last taken.

    A backward pass that is under way has `publish`ed d(loss)/d(sum of ratios / samples); else that
    is 0.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: dict[str, nn.Module],
        heads: set[nn.Module],
        exact: bool,
        detach_deviation: bool,
    ) -> None:
        self.model, self.heads = model, heads
        self.exact, self.detach_deviation = exact, detach_deviation
        self.enabled = True
        first = next(iter(model.parameters()), torch.empty(0))
        self._coefficient = torch.zeros((), device=first.device)
        self._shares: dict[tuple[Any, ...], Tensor] = {}
        self.reentrant = False  # a checkpoint of the kind that runs its region without gradient
        self._inside = False
        self._samples = 1
        self._samples_of: dict[torch.Size, int] = {}  # what a recomputation finds
        self._pending: list[Observation] = []
        self._observations: list[Observation] = []
        self._known = WeakTensorKeyDictionary()
        self._handles = [
            model.register_forward_pre_hook(Hook(self._enter), with_kwargs=True, prepend=True)
        ]
        for name, module in sites.items():
            self._handles += [
                module.register_forward_pre_hook(Hook(self._before, name), with_kwargs=True),
                module.register_forward_hook(Hook(self._after, name)),
            ]
        # always, so that an exception in the middle of a forward closes it too
        leave = model.register_forward_hook(Hook(self._leave), always_call=True)
        self._handles.append(leave)

    def take(self) -> list[Observation]:
        """Return the observations since the last call, one per distinct tensor, and forget them."""
        taken, self._observations = self._observations, []
        return [observation for observation in taken if observation.multiplicity]

    def publish(self, coefficient: Tensor) -> None:
        """Set the weight of one instance of eq. 2 in the backward pass that begins."""
        self._coefficient.copy_(coefficient)
        self._shares.clear()

    def end_backward(self) -> None:
        """Forget the weight of the loss whose backward has ended."""
        self._coefficient.zero_()
        self._shares.clear()

    def share(self, multiplicity: int, statistics: Tensor) -> Tensor:
        """Return the gradient of the loss with respect to the ratio of each sample of a tensor."""
        samples, dtype = len(statistics), statistics.dtype
        key = multiplicity, samples, dtype, statistics.device
        if key not in self._shares:  # few differ, and a tensor operation costs as much as a kernel
            weight = self._coefficient.to(statistics.device, dtype) * (multiplicity / samples)
            self._shares[key] = weight.repeat(samples)
        return self._shares[key]

    def remove(self) -> None:
        """Take all hooks off, and leave the model as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._observations, self._pending = [], [], []

    # ------------------------------------------------------------------------------ hooks

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._inside = self.enabled and module.training and torch.is_grad_enabled()
        self._pending = []
        if not _recomputing():
            self.end_backward()  # one that failed halfway did not
        if self._inside:
            self._samples = batch_size(module, args, kwargs)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not self._inside:
            return
        self._inside = False
        if output is None:  # an exception: the half pass does not count
            self._pending = []
            return
        self._leave_out_logits(output)
        self._observations += self._pending
        self._pending = []

    def _before(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not args:
            return None
        x = self._observe(args[0], f"{name}.input", module)
        return None if x is args[0] else ((x, *args[1:]), kwargs)

    def _after(
        self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any
    ) -> Tensor | None:
        if module in self.heads:
            return None
        y = self._observe(output, f"{name}.output", module)
        return None if y is output else y

    def _observe(self, x: Any, site: str, module: nn.Module) -> Any:
        recomputing, graph = _recomputing(), torch.is_grad_enabled()
        if not (self._inside or (recomputing and self.enabled and self.model.training)):
            return x
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.numel() == 0:
            return x
        known = self._known.get(x)
        # without a graph, the gradient of what a region sees is that of its recomputation
        if known is not None and known.version == x._version and known.graph == graph:
            # a tensor from before a checkpoint's region was counted when it first came by
            known.multiplicity += known.recomputed == recomputing
            return x
        if not recomputing:
            # batch-major if the samples divide it; else it is one sample, apart from the batch
            self._samples_of[x.shape] = self._samples if x.shape[0] % self._samples == 0 else 1
        samples = self._samples_of.get(x.shape)
        if samples is None:  # recomputed, but its forward was not observed
            return x
        observation = Observation(site, module, x._version, recomputing, graph)
        observation.awaits_gradient = x.requires_grad and graph
        self.reentrant |= not graph
        y = _Tap.apply(x, samples, observation, self)
        self._known[y] = observation
        if not recomputing:
            self._pending.append(observation)
        return y

    def _leave_out_logits(self, output: Any) -> None:
        for leaf in tree_leaves(output):
            known = self._known.get(leaf) if isinstance(leaf, Tensor) else None
            if known and known.site.endswith(".output") and isinstance(known.module, nn.Linear):
                known.multiplicity = 0
                self.heads.add(known.module)


def _recomputing() -> bool:
    """Tell whether a backward pass is under way: a forward within it is that of a checkpoint."""
    return torch._C._current_graph_task_id() != -1


class Hook:
    """A method with its first arguments, as a hook. A copy of the model gets an inert one."""

    def __init__(self, method: Any = None, *arguments: Any) -> None:
        self.method, self.arguments = method, arguments

    def __call__(self, *arguments: Any) -> Any:
        return self.method(*self.arguments, *arguments) if self.method else None

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return Hook, ()


def batch_size(model: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> int:
    """Return the first dimension of the first tensor that the model is called with."""
    main = kwargs.get(getattr(model, "main_input_name", None) or "")  # transformers names it
    for leaf in tree_leaves((main, args, kwargs)):
        if isinstance(leaf, Tensor) and leaf.dim():
            return leaf.shape[0]
    raise ValueError(
        f"{type(model).__name__} was called without a tensor to take the batch size from"
    )
