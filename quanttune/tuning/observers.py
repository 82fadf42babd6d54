"""Hooks that observe every site of a forward pass, and what they know of it.

An observed tensor passes through a tap: the model goes on with a view of the same storage, and the
tap's backward adds the gradient of the outlier loss to the one that comes in, in a single pass. How
much of it, the combined loss says when its own backward starts (mixing.py). Nothing here holds a
graph, so gradient accumulation, loss scaling and both kinds of activation checkpointing need no
bookkeeping: a tap that a checkpoint recomputes finds the coefficient published already.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .. import ops
from ..losses import OutlierLoss
from ..masks import Mask
from .hooks import Hook, make_compiler_see_hooks, recomputing, refuse_compiled_parts
from .observation import Forward, Observation
from .observed_tensors import ObservedTensors
from .sites import is_linear
from .taps import observation_behind


class Observers(ObservedTensors):
    """The hooks on a model's sites, and the observations since they were last taken."""

    def __init__(
        self,
        model: nn.Module,
        sites: dict[str, nn.Module],
        heads: set[nn.Module],
        loss: OutlierLoss,
        mask: Mask | None = None,
        unobserved: Sequence[str] = (),
    ) -> None:
        make_compiler_see_hooks()
        super().__init__(model, loss, mask)
        self.heads = heads
        self.unobserved = unobserved  # modules that no hook sees; they are named
        self._names = list(sites)
        self.compiled = False  # torch.compile has traced a forward
        self.unplanned = False  # it has before there was a plan, and nothing was observed
        self._handles: list[Any] = [
            model.register_forward_pre_hook(Hook(self._enter), with_kwargs=True, prepend=True)
        ]
        for name, module in self._layouts.receivers.items():
            hook = Hook(self._receive, name)
            self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        for name, module in sites.items():
            self._handles += self._hooks_on(name, module)
        # always, so that an exception in the middle of a forward closes it too
        leave = model.register_forward_hook(Hook(self._leave), always_call=True)
        self._handles.append(leave)

    @property
    def is_planned(self) -> bool:
        """Whether torch.compile can trace a forward."""
        return self._plan.is_made

    @property
    def unreached(self) -> list[str]:
        """The modules that the first forward did not call."""
        reached = {site.rpartition(".")[0] for site in self._plan.reached}
        return [name for name in self._names if name not in reached]

    def take(self) -> list[Observation]:
        """Return the observations since the last call, one per distinct tensor, and forget them."""
        taken: list[Observation] = []
        while self._last:
            taken[:0] = [o for o in self._last.observations if o.multiplicity]
            self._last = self._last.before
        return taken

    def remove(self) -> None:
        """Take all hooks off, and leave the model as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._last, self._pending = [], None, []
        self._layouts.end()
        self._plan.begin(follow=False)

    def _hooks_on(self, name: str, module: nn.Module) -> list[Any]:
        return [
            module.register_forward_pre_hook(Hook(self._before, name), with_kwargs=True),
            module.register_forward_hook(Hook(self._after, name)),
        ]

    # ------------------------------------------------------------------------------ hooks

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._inside = self.enabled and module.training and torch.is_grad_enabled()
        self._pending, self.context.group = [], None
        tracing = torch.compiler.is_compiling()
        if tracing:
            self.compiled = True
            self.unplanned = self._inside and not self._plan.is_made
            self._inside &= not self.unplanned
        elif not recomputing():
            if self._inside:
                refuse_compiled_parts(module)
            self.context.upstream.clear()  # one that failed halfway did not
            self.context.group = ops.StatisticsGroup() if self._inside else None
        self._plan.begin(follow=tracing and self._inside)
        if self._inside:
            self._layouts.begin(args, kwargs)
        if self._last is None:
            self._layouts.forget()

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not self._inside:
            return
        self._inside = False
        if output is not None:  # else an exception: half a pass does not count
            if self.context.group:
                self.context.group.finish()
            if self._plan.is_followed:
                self._plan.check_end()
            else:
                self._leave_out_logits(output)
                self._plan.make()
            self._last = Forward(self._pending, self._last)
        self._pending, self.context.group = [], None
        self._layouts.end(whole=output is not None)
        self._plan.begin(follow=False)

    def _receive(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if self._inside:
            self._layouts.receive(name, args, kwargs)

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

    def _leave_out_logits(self, output: Any) -> None:
        for leaf in tree_leaves(output):
            if not isinstance(leaf, Tensor):
                continue
            known = self._known.get(leaf) or observation_behind(leaf)
            if known and known.site.endswith(".output") and is_linear(known.module):
                known.multiplicity = 0
                self.heads.add(known.module)
