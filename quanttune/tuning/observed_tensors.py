"""Which tensors of a forward are observed, and what is known of each while it is under way."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..losses import OutlierLoss
from ..masks import Mask
from .hooks import recomputing
from .layout import Layout, Layouts
from .loss_weight import Upstream
from .observation import Context, Forward, Observation
from .taps import PlannedTap, Tap
from .trace_order import Plan


class ObservedTensors:
    """The tensors of the forward that is under way: each is observed once, whatever sites meet it.

    A tensor is known until it is changed in place; one that a checkpoint recomputes is another one.
    """

    def __init__(self, model: nn.Module, loss: OutlierLoss, mask: Mask | None) -> None:
        self.model = model
        self.enabled = True
        upstream = Upstream(next(iter(model.parameters()), torch.empty(0)))
        self.context = Context(loss, upstream)
        self.reentrant = False  # a checkpoint of the kind that runs its region without gradient
        self._inside = False  # of a forward that is observed
        self._plan = Plan()
        self._layouts = Layouts(model, mask)
        self._pending: list[Observation] = []  # of the forward that is under way
        self._last: Forward | None = None
        self._known = WeakTensorKeyDictionary()

    def _observe(self, x: Any, site: str, module: nn.Module) -> Any:
        if not self._sees(x, site):
            return x
        if torch.compiler.is_compiling():
            return self._observe_planned(x, site, module)
        observation = self._sight(x, site, module)
        if observation is None:
            return x
        padding = observation.padding
        y = Tap.apply(padding.pack(x) if padding else x, observation, self.context)
        return self._know(padding.unpack(y) if padding else y, observation, x)

    def _sees(self, x: Any, site: str) -> bool:
        """Tell whether x is to be observed in the forward that is under way."""
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
        return self._inside or (recomputing() and self.enabled and self.model.training)

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
            return self._new(x, site, module)
        if not recomputing():
            layout = Layout(known.samples, known.padding, known.source)
            self._layouts.remember(x, site, layout, is_first=self._last is None)
        # a tensor from before a checkpoint's region was counted when it first came by
        known.multiplicity += known.recomputed == recomputing()
        self._visit(site, None)
        return None

    def _new(self, x: Tensor, site: str, module: nn.Module) -> Observation | None:
        layout = self._layouts.keep(x, site, is_first=self._last is None)
        if layout is None:
            return None
        samples, padding, source = layout
        graph = torch.is_grad_enabled()
        self.reentrant |= not graph
        ranges = padding.ranges_in(x) if padding else None
        known = samples, recomputing(), graph, 1, padding, ranges
        observation = Observation(site, module, *known, source=source)
        if not observation.recomputed:
            self._pending.append(observation)
        self._visit(site, observation)
        return observation

    def _know(self, y: Tensor, observation: Observation, x: Tensor) -> Tensor:
        """Remember what y, which was made of x, is to the sites that meet it from here on."""
        self._layouts.hand_on(x, y)
        observation.version = y._version
        observation.awaits_gradient = y.requires_grad and observation.graph
        self._known[y] = observation
        return y

    def _observe_planned(self, x: Tensor, site: str, module: nn.Module) -> Tensor:
        multiplicity, source = self._plan.follow(site)
        if multiplicity == 0:
            return x
        samples, padding, _ = self._layouts.planned(x, source)
        ranges = padding.ranges_in(x) if padding else None
        options = samples, multiplicity, self.context.loss, ranges
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
