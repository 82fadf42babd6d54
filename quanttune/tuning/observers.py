"""Hooks that observe every site of a forward pass, and what they know of it.

An observed tensor passes through a tap: the model goes on with a view of the same storage, and the
tap's backward adds the gradient of the outlier loss to the one that comes in, in a single pass. How
much of it, the combined loss says when its own backward starts (loss.py). Nothing here holds a
graph, so gradient accumulation, loss scaling and both kinds of activation checkpointing need no
bookkeeping: a tap that a checkpoint recomputes finds the coefficient published already.

While torch.compile traces, nothing tells tensors apart. A forward before that has left a plan:
which observed tensors come in which order, and how many instances each stands for.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from .. import ops
from .taps import Forward, Observation, PlannedTap, Tap

_OTHER_ORDER = (
    ", which the first forward after attach() had otherwise: a model that skips or repeats layers "
    "at random cannot be tuned under torch.compile"
)


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
        _make_compiler_see_hooks()
        self.enabled = True
        first = next(iter(model.parameters()), torch.empty(0))
        self._coefficient = torch.zeros((), device=first.device)
        self._shares: dict[tuple[Any, ...], Tensor] = {}
        self.reentrant = False  # a checkpoint of the kind that runs its region without gradient
        self.compiled = False  # torch.compile has traced a forward
        self.unplanned = False  # it has before there was a plan, and nothing was observed
        self._visits: list[tuple[str, Observation | None]] = []  # sites, and what is new there
        self._plan: list[tuple[str, int]] | None = None  # the same, with its instances
        self._position: int | None = None  # in the plan, while torch.compile traces
        self._inside = False
        self._samples = 1
        self._samples_of: dict[torch.Size, int] = {}  # what a recomputation finds
        self._pending: list[Observation] = []
        self._group: ops.StatisticsGroup | None = None  # of the forward that is under way
        self._last: Forward | None = None
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

    @property
    def is_planned(self) -> bool:
        """Whether torch.compile can trace a forward."""
        return self._plan is not None

    def take(self) -> list[Observation]:
        """Return the observations since the last call, one per distinct tensor, and forget them."""
        taken: list[Observation] = []
        while self._last:
            taken[:0] = [o for o in self._last.observations if o.multiplicity]
            self._last = self._last.before
        return taken

    def publish(self, coefficient: Tensor) -> None:
        """Set the weight of one instance of eq. 2 in the backward pass that begins."""
        # by way of .data, for a compiled forward has saved it for its backward
        self._coefficient.data.copy_(coefficient)
        self._shares.clear()

    def end_backward(self) -> None:
        """Forget the weight of the loss whose backward has ended."""
        self._coefficient.data.zero_()
        self._shares.clear()

    def share(self, multiplicity: int, statistics: Tensor) -> Tensor:
        """Return the gradient of the loss with respect to the ratio of each sample of a tensor."""
        samples, dtype = len(statistics), statistics.dtype
        key = multiplicity, samples, dtype, statistics.device
        if key not in self._shares:  # few differ, and a tensor operation costs as much as a kernel
            weight = self._coefficient.to(statistics.device, dtype) * (multiplicity / samples)
            self._shares[key] = weight.repeat(samples)
        return self._shares[key]

    def measure(self, x: Tensor, samples: int) -> Tensor:
        """Return the statistics of x, which are there at the end of the forward."""
        if self._group is None:
            return ops.outlier_statistics(x, samples, self.exact)
        return self._group.outlier_statistics(x, samples, self.exact)

    def remove(self) -> None:
        """Take all hooks off, and leave the model as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._last, self._pending, self._visits = [], None, [], []

    # ------------------------------------------------------------------------------ hooks

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._inside = self.enabled and module.training and torch.is_grad_enabled()
        self._pending, self._visits, self._position, self._group = [], [], None, None
        if torch.compiler.is_compiling():
            self.compiled = True
            self.unplanned = self._inside and self._plan is None
            self._inside &= not self.unplanned
            self._position = 0 if self._inside else None
        elif not _recomputing():
            self.end_backward()  # one that failed halfway did not
            self._group = ops.StatisticsGroup() if self._inside else None
        if self._inside:
            self._samples = batch_size(module, args, kwargs)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not self._inside:
            return
        self._inside = False
        if output is not None:  # else an exception: half a pass does not count
            if self._group:
                self._group.finish()
            if self._position is None:
                self._leave_out_logits(output)
                self._make_plan()
            elif self._position != len(self._plan or ()):
                raise RuntimeError(f"only {self._position} tensors were observed{_OTHER_ORDER}")
            self._last = Forward(self._pending, self._last)
        self._pending, self._visits, self._position, self._group = [], [], None, None

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
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.numel() == 0:
            return x
        if torch.compiler.is_compiling():
            return self._observe_planned(x, site, module) if self._inside else x
        if self._position is not None:
            raise RuntimeError(
                f"torch.compile broke the forward into several graphs, the first ends before {site}"
                ": tuning needs a single one. fullgraph=True tells why it breaks"
            )
        recomputing, graph = _recomputing(), torch.is_grad_enabled()
        if not (self._inside or (recomputing and self.enabled and self.model.training)):
            return x
        known = self._known.get(x)
        # without a graph, the gradient of what a region sees is that of its recomputation
        if known is not None and known.version == x._version and known.graph == graph:
            # a tensor from before a checkpoint's region was counted when it first came by
            known.multiplicity += known.recomputed == recomputing
            self._visit(site, None)
            return x
        if not recomputing:
            self._samples_of[x.shape] = self._samples_in(x)
        samples = self._samples_of.get(x.shape)
        if samples is None:  # recomputed, but its forward was not observed
            return x
        observation = Observation(site, module, x._version, recomputing, graph)
        observation.awaits_gradient = x.requires_grad and graph
        self.reentrant |= not graph
        y = Tap.apply(x, samples, observation, self)
        self._known[y] = observation
        if not recomputing:
            self._pending.append(observation)
            self._visit(site, observation)
        return y

    def _observe_planned(self, x: Tensor, site: str, module: nn.Module) -> Tensor:
        plan, position = self._plan or [], self._position
        if position is None or position >= len(plan) or plan[position][0] != site:
            raise RuntimeError(f"{site} is observed{_OTHER_ORDER}")
        self._position = position + 1
        multiplicity = plan[position][1]
        if multiplicity == 0:
            return x
        samples = self._samples_in(x)
        y, statistics = PlannedTap.apply(
            x, self._coefficient, samples, multiplicity, self.exact, self.detach_deviation
        )
        observation = Observation(site, module, 0, False, True, multiplicity, statistics)
        self._pending.append(observation)
        return y

    def _samples_in(self, x: Tensor) -> int:
        # batch-major if the samples divide it; else it is one sample, apart from the batch
        return self._samples if x.shape[0] % self._samples == 0 else 1

    def _visit(self, site: str, observation: Observation | None) -> None:
        if self._plan is None and not _recomputing():
            self._visits.append((site, observation))

    def _make_plan(self) -> None:
        """Note, once, what a traced forward cannot find out; logits are no longer visited then."""
        if self._plan is None:
            self._plan = [
                (site, observation.multiplicity if observation else 0)
                for site, observation in self._visits
                if observation is None or observation.multiplicity
            ]

    def _leave_out_logits(self, output: Any) -> None:
        for leaf in tree_leaves(output):
            known = self._known.get(leaf) if isinstance(leaf, Tensor) else None
            if known and known.site.endswith(".output") and isinstance(known.module, nn.Linear):
                known.multiplicity = 0
                self.heads.add(known.module)


def _recomputing() -> bool:
    """Tell whether a backward pass is under way: a forward within it is that of a checkpoint."""
    return torch._C._current_graph_task_id() != -1


def _make_compiler_see_hooks() -> None:
    """Let torch.compile tell a model with hooks from one without; by default it takes no notice.

    Else a compiled model would go on without those of a tuner that is attached later, or with those
    of a model of the same class.
    """
    import torch._dynamo.config  # takes 1.5 s, unless transformers or timm has done it

    torch._dynamo.config.skip_nnmodule_hook_guards = False
    torch.compiler.reset()  # what was compiled before


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
