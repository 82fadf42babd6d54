"""Hooks that observe every site of a forward pass, and what they know of it.

An observed tensor passes through a tap: the model goes on with a view of the same storage, and the
tap's backward adds the gradient of the outlier loss to the one that comes in, in a single pass. How
much of it, the combined loss says when its own backward starts (loss.py). Nothing here holds a
graph, so gradient accumulation, loss scaling and both kinds of activation checkpointing need no
bookkeeping: a tap that a checkpoint recomputes finds the coefficient published already.

Modules that are fused (fused_modules.py) need no taps: they observe what they compute. LayerNorms
are from the start; activations once the forwards before the first backward have told which of them
stand between two sites.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from .. import ops
from ..losses import OutlierLoss
from ..masks import Mask
from . import fused_modules
from .hooks import Hook, make_compiler_see_hooks, recomputing, refuse_compiled_parts
from .layout import Layout, Layouts
from .loss_weight import Upstream
from .observation import Context, Forward, Observation
from .taps import PlannedTap, Tap, observation_behind
from .trace_order import Plan


class Observers:
    """The hooks on a model's sites, and the observations since they were last taken."""

    def __init__(
        self,
        model: nn.Module,
        sites: dict[str, nn.Module],
        heads: set[nn.Module],
        loss: OutlierLoss,
        fuse: bool = False,
        mask: Mask | None = None,
        unobserved: Sequence[str] = (),
    ) -> None:
        self.model, self.heads = model, heads
        self.unobserved = unobserved  # modules that no hook sees; they are named
        self.fuse = fuse
        make_compiler_see_hooks()
        self._names = list(sites)
        self.enabled = True
        upstream = Upstream(next(iter(model.parameters()), torch.empty(0)))
        self.context = Context(loss, upstream)
        self.reentrant = False  # a checkpoint of the kind that runs its region without gradient
        self.compiled = False  # torch.compile has traced a forward
        self.unplanned = False  # it has before there was a plan, and nothing was observed
        self._plan = Plan()
        self._inside = False
        self._layouts = Layouts(model, mask)
        self._pending: list[Observation] = []
        self._last: Forward | None = None
        self._known = WeakTensorKeyDictionary()
        self._activations = fused_modules.Activations()
        self._handles: list[Any] = [
            model.register_forward_pre_hook(Hook(self._enter), with_kwargs=True, prepend=True)
        ]
        for name, module in self._layouts.receivers.items():
            hook = Hook(self._receive, name)
            self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        for name, module in sites.items():
            self._handles += self._hooks_on(name, module)
        if fuse:
            self._handles += self._activations.fuse(model, self._activation)
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

    def end_first_backward(self) -> None:
        """Fuse activations: no forward of those that taught which ones is recomputed now."""
        self._activations.start()

    def remove(self) -> None:
        """Take all hooks off, and leave the model as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._last, self._pending = [], None, []
        self._layouts.end()
        self._plan.begin(follow=False)

    def _hooks_on(self, name: str, module: nn.Module) -> list[Any]:
        if self.fuse and fused_modules.is_plain_norm(module):
            return [fused_modules.Handle(module, Hook(self._norm, name))]
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
                self._check_deferred()
                self._leave_out_logits(output)
                self._plan.make()
            self._last = Forward(self._pending, self._last)
        self._pending, self.context.group = [], None
        self._layouts.end()
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

    def _norm(self, name: str, module: Any, plain: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Run a LayerNorm that is fused."""
        tracing = torch.compiler.is_compiling()
        if tracing or not (
            fused_modules.fits(module, x) and self._sees(x, f"{name}.input", whole=True)
        ):
            y = plain(self._observe(x, f"{name}.input", module))
            return self._observe(y, f"{name}.output", module)
        before = self._sight(x, f"{name}.input", module)
        after = self._new(x, f"{name}.output", module)  # y has its shape
        if after is None:
            return plain(x)
        parameters = module.weight, module.bias, module.eps
        y = fused_modules.FusedLayerNorm.apply(x, *parameters, before, after, self.context)
        return self._know(y, after, x)

    def _activation(
        self, name: str, kind: str, module: nn.Module, plain: Callable[[Tensor], Tensor], x: Tensor
    ) -> Tensor:
        """Run an activation that is fused, or learn whether it could."""
        if torch.compiler.is_compiling() or not self._sees(x, name, whole=True):
            return plain(x)
        known = self._find(x)
        if name not in self._activations.fused:
            return self._activations.learn(name, known.site if known else "", plain(x))
        after = self._new(x, "", module, name)
        if after is None:
            return plain(x)
        before = known if known and known.statistics is None else None
        return self._know(
            fused_modules.FusedActivation.apply(x, kind, before, after, self.context), after, x
        )

    # ------------------------------------------------------------------------------ tensors

    def _observe(self, x: Any, site: str, module: nn.Module) -> Any:
        if not self._sees(x, site):
            return x
        if torch.compiler.is_compiling():
            return self._observe_planned(x, site, module)
        deferred = site in self._activations.deferred and self._find(x) is None
        observation = (self._new if deferred else self._sight)(x, site, module)
        if observation is None:
            return x
        padding = observation.padding
        if padding is None:
            y = x if deferred else Tap.apply(x, observation, self.context)
            return self._know(y, observation, x)
        y = padding.unpack(Tap.apply(padding.pack(x), observation, self.context))
        return self._know(y, observation, x)

    def _sees(self, x: Any, site: str, whole: bool = False) -> bool:
        """Tell whether x is to be observed in the forward that is under way, and has no padding."""
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return False
        if x.is_nested:
            raise TypeError(
                f"{site} is a nested tensor, whose samples cannot be told: give padded batches, "
                "with a mask, while a tuner is attached"
            )
        if x.numel() == 0:
            return False
        if torch.compiler.is_compiling():
            return self._inside
        if self._plan.is_followed:
            raise RuntimeError(
                f"torch.compile broke the forward into several graphs, the first ends before {site}"
                ": tuning needs a single one. fullgraph=True tells why it breaks"
            )
        sees = self._inside or (recomputing() and self.enabled and self.model.training)
        return sees and not (whole and self._layouts.is_padded(x, site))

    def _find(self, x: Tensor) -> Observation | None:
        known = self._known.get(x)
        # without a graph, the gradient of what a region sees is that of its recomputation
        valid = known and known.version == x._version and known.graph == torch.is_grad_enabled()
        return known if valid else None

    def _sight(self, x: Tensor, site: str, module: nn.Module) -> Observation | None:
        """Count x at a site. Return its observation if its statistics are still to be taken."""
        known = self._find(x)
        if known and recomputing() and not known.recomputed and site in self._plan.always_new:
            known = None  # FSDP2 hands its module a view of the input, but not in a recomputation
        if known is None:
            if self.fuse:
                self._activations.meet(x)
            return self._new(x, site, module)
        if not known.site:  # of a fused activation: this is the site it is made for
            known.site, known.module, known.multiplicity = site, module, 1
            self._count(known)
            return None
        if not recomputing():
            layout = Layout(known.samples, known.padding, known.source)
            self._layouts.remember(x, site, layout, is_first=self._last is None)
        # a tensor from before a checkpoint's region was counted when it first came by
        known.multiplicity += known.recomputed == recomputing()
        self._visit(site, None)
        return known if known.statistics is None else None

    def _new(self, x: Tensor, site: str, module: nn.Module, name: str = "") -> Observation | None:
        """Return an observation of x, or of a result that has its shape; "" is no site yet."""
        layout = self._layouts.keep(x, site or name, is_first=self._last is None)
        if layout is None:
            return None
        samples, padding, source = layout
        graph = torch.is_grad_enabled()
        self.reentrant |= not graph
        known = samples, recomputing(), graph, int(site != ""), padding
        ranges = padding.ranges_in(x) if padding else None
        observation = Observation(site, module, *known, ranges, source=source)
        if site:
            self._count(observation)
        return observation

    def _know(self, y: Tensor, observation: Observation, x: Tensor) -> Tensor:
        """Remember what y, which was made of x, is to the sites that meet it from here on."""
        self._layouts.hand_on(x, y)
        observation.version = y._version
        observation.awaits_gradient = y.requires_grad and observation.graph
        self._known[y] = observation
        return y

    def _count(self, observation: Observation) -> None:
        if not observation.recomputed:
            self._pending.append(observation)
        self._visit(observation.site, observation)

    def _observe_planned(self, x: Tensor, site: str, module: nn.Module) -> Tensor:
        multiplicity, source = self._plan.follow(site)
        if multiplicity == 0:
            return x
        samples, padding, _ = self._layouts.planned(x, source)
        ranges = padding.ranges_in(x) if padding else None
        options = samples, multiplicity, self.context.loss, self.fuse, ranges
        y = padding.pack(x) if padding else x
        y, statistics = PlannedTap.apply(y, self.context.upstream.coefficient, *options)
        y = padding.unpack(y) if padding else y
        observation = Observation(
            site, module, samples, False, True, multiplicity, statistics=statistics
        )
        self._pending.append(observation)
        return y

    def _visit(self, site: str, observation: Observation | None) -> None:
        if not recomputing():
            self._plan.visit(site, observation)

    def _check_deferred(self) -> None:
        lost = [o.site for o in self._pending if o.statistics is None]
        if lost:
            raise RuntimeError(
                f"{lost[0]} did not reach the activation that observes it, as in the first "
                "forward after attach(): this model needs fuse=False"
            )

    def _leave_out_logits(self, output: Any) -> None:
        for leaf in tree_leaves(output):
            if not isinstance(leaf, Tensor):
                continue
            known = self._known.get(leaf) or observation_behind(leaf)
            if known and known.site.endswith(".output") and isinstance(known.module, nn.Linear):
                known.multiplicity = 0
                self.heads.add(known.module)
