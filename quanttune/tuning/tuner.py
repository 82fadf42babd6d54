"""Mix the outlier loss of an attached model into the task's, step by step."""

import math
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..reference import MAXIMUM
from . import schedule
from .finishing import Finishing
from .loss_weight import Upstream
from .mixing import combine, instances, outlier_loss
from .observation import Observation
from .observers import Observers

# warn when the norm of the outlier term's gradient is this many times the task's
GRADIENT_RATIO_WARNING = 3.0


class Tuner:
    """What `attach` returns: `combine` the loss, `step` after the optimizer, `detach` at the end.

    `task_loss` and `outlier_loss` hold the two terms of the last `combine`, as tensors without a
    graph. `balance_factor` is what balance="initial" found at the first; set it to go on with it.
    """

    def __init__(
        self,
        model: nn.Module,
        observers: Observers,
        alpha: float,
        decay: str,
        total_steps: int | None,
        balance: str,
        observe_every: int = 1,
        finishing: Finishing | None = None,
    ) -> None:
        self.model = model
        self.steps = 0
        self.task_loss: Tensor | None = None
        self.outlier_loss: Tensor | None = None
        self._observers = observers
        self._finishing = finishing
        if finishing and total_steps:
            total_steps -= finishing.steps
        self._schedule = alpha, decay, total_steps
        self._balance, self._every = balance, observe_every
        self.balance_factor: Tensor | None = None
        self._observed: list[Observation] = []
        self._checked_first = self._checked_reach = False
        self.resume(0)

    @property
    def alpha(self) -> float:
        """The weight of the outlier loss at the current optimizer step."""
        if self._finishing and self._finishing.is_begun:
            return 0.0
        return schedule.alpha_at(self.steps, *self._schedule)

    def combine(self, loss: Tensor) -> Tensor:
        """Return (1 - alpha) * loss + alpha * L_out (eq. 3) over all forwards since the last call.

        With alpha = 0, or without gradients, that is `loss` itself. With observe_every = k the last
        term is there at every k-th step, with k times its weight.

        Raises:
            ValueError: the loss is no scalar tensor. RuntimeError: no activation was observed.
        """
        if not isinstance(loss, Tensor) or loss.dim():
            got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"the loss must be a tensor without dimensions, got {got}")
        observations = self._observers.take()
        if self._finishing and self._observers.compiled:
            raise ValueError(
                "finish_steps and torch.compile do not go together: each width would be traced "
                "anew. Train without torch.compile, or with finish_steps=0"
            )
        alpha = self.alpha
        if alpha == 0 or not (torch.is_grad_enabled() and loss.requires_grad):
            return loss
        if not self._observers.enabled:
            return (1 - alpha) * loss
        if not observations and self._observers.unplanned:
            raise RuntimeError(
                "the compiled model was called before the model itself: one forward in training "
                "mode without torch.compile tells which tensors are observed. With "
                'torch.compiler.set_stance("force_eager"): model(batch)'
            )
        if not observations:
            raise RuntimeError(
                "no activation was observed since the last combine: the attached model must be in "
                "training mode (model.train()) and be called itself, not through its submodules, "
                "with a batch that is not empty"
            )
        outlier = outlier_loss(observations, self._observers.context.loss, loss.device)
        self._observed = observations
        weight = alpha * self._every * self._balance_factor(loss.detach(), outlier)
        self.task_loss, self.outlier_loss = loss.detach(), outlier
        arguments = (self._observers.context.upstream, instances(observations))
        if not self._checked_first:
            self._checked_first = True
            self._name_uncalled()
            self._compare_gradients(loss, outlier, 1 - alpha, weight, *arguments)
        report = None if self._checked_reach else self._report_of_reach(observations)
        return combine(loss, outlier, 1 - alpha, weight, *arguments, report)

    def forget(self) -> None:
        """Leave the forwards since the last `combine` out of the next one.

        It is for a step that was given up behind its forward, as when memory ran out.
        """
        self._observers.take()

    def step(self) -> None:
        """Advance the schedule of alpha; call it after each optimizer step."""
        self.resume(self.steps + 1)

    def resume(self, steps: int) -> None:
        """Go on with the schedule after this many optimizer steps.

        Raises:
            ValueError: the model rounds already, and would not at that step.
        """
        self.steps = steps
        if self._finishing:
            self._finish(self._finishing)
        self._observers.enabled = self.alpha != 0 and steps % self._every == 0

    def ranges(self) -> dict[str, float]:
        """Return max|A| of each observed tensor, by site, at the last `combine`."""
        return {
            o.site: o.statistics[:, MAXIMUM].max().item()
            for o in self._observed
            if o.statistics is not None
        }

    @property
    def is_planned(self) -> bool:
        """Whether a forward has been observed without torch.compile, which it needs."""
        return self._observers.is_planned

    def detach(self) -> None:
        """Take every hook off the model, which is then exactly what it was."""
        self._observers.remove()
        if self._finishing:
            self._finishing.end()

    def _finish(self, finishing: Finishing) -> None:
        *_, begin = self._schedule
        assert begin is not None
        if self.steps >= begin:
            if not finishing.is_begun:
                self._observers.remove()
                self.task_loss, self.outlier_loss, self._observed = None, None, []
                finishing.begin()
            finishing.round_to(self.steps)
        elif finishing.is_begun:
            raise ValueError(
                f"the model rounds since step {begin}, and cannot go back to step "
                f"{self.steps}: detach() the tuner and attach the model anew"
            )

    def _balance_factor(self, task: Tensor, outlier: Tensor) -> Tensor:
        if self._balance == "none":
            return torch.ones_like(outlier)
        if self.balance_factor is None:
            first = torch.stack([task, outlier])
            if torch.distributed.is_initialized():  # one factor for all processes
                torch.distributed.all_reduce(first)
            self.balance_factor = first[0] / first[1]
            if not (math.isfinite(self.balance_factor) and self.balance_factor > 0):
                raise ValueError(
                    'balance="initial" needs positive first losses, got '
                    f"{task.item():.4g} for the task and {outlier.item():.4g} for the outliers: "
                    'use balance="none"'
                )
        return self.balance_factor

    def _compare_gradients(
        self,
        task: Tensor,
        outlier: Tensor,
        task_weight: float,
        outlier_weight: Tensor,
        upstream: Upstream,
        count: int,
    ) -> None:
        """Warn if the outlier term would drown the task; this costs two backward passes.

        Left out where a second backward is not possible or would be collective: under reentrant
        checkpoints, in a compiled model and in a process group.
        """
        observers = self._observers
        if observers.reentrant or observers.compiled or torch.distributed.is_initialized():
            return
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        norms = []
        for weights in ((task_weight, 0 * outlier_weight), (0.0, outlier_weight)):
            total = combine(task, outlier, *weights, upstream, count)
            try:
                norms.append(_gradient_norm(total, parameters))
            except RuntimeError:
                # Lightning's Fabric refuses a backward that is not its own. What is wrong for
                # another reason comes up again in the user's.
                upstream.clear()
                return
        if norms[1] > GRADIENT_RATIO_WARNING * norms[0]:
            warnings.warn(
                f"the outlier term's gradient norm is {norms[1]:.3g} at the first step, the task's "
                f"{norms[0]:.3g}: the task may be lost. Lower alpha, or pass balance='initial'",
                stacklevel=3,
            )

    def _name_uncalled(self) -> None:
        if experts := self._observers.unobserved:
            warnings.warn(
                f"{len(experts)} module(s) multiply by matrices that they hold in one parameter, "
                f"as experts do: {', '.join(experts[:5])}. What goes into these products and comes "
                "out does not count; exclude=[...] says that this is known",
                stacklevel=3,
            )
        if unreached := self._observers.unreached:
            warnings.warn(
                f"the first forward did not call {len(unreached)} observed module(s), and may use "
                f"their weights otherwise: {', '.join(unreached[:5])}. Their tensors do not count; "
                "exclude=[...] says that this is known",
                stacklevel=3,
            )

    def _report_of_reach(self, observations: list[Observation]) -> Callable[[], None]:
        """Return what names, after the first backward, the sites that got no gradient in it."""

        def report() -> None:
            if self._checked_reach:
                return
            self._checked_reach = True
            lost = [o.site for o in observations if o.awaits_gradient]
            if lost:
                warnings.warn(
                    f"{len(lost)} observed tensor(s) do not reach the loss and are counted in it "
                    f"without a gradient: {', '.join(lost[:5])}. Leave them out with exclude=[...]",
                    stacklevel=2,
                )

        return report


def _gradient_norm(total: Tensor, parameters: Sequence[nn.Parameter]) -> float:
    """Return the norm of a gradient, which is not kept: two of a large model are many bytes."""
    gradients = torch.autograd.grad(total, parameters, retain_graph=True, allow_unused=True)
    parts = [g.detach().float().norm() for g in gradients if g is not None]
    return torch.stack(parts).norm().item() if parts else 0.0
