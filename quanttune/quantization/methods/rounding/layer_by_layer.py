"""Go through a model layer by layer, each rounded before the next one is given its inputs."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ....progress import track
from ...running import Data, evaluating, forward_batches
from ...scheme import Scheme
from ...stepped_forward import NoThread, SteppedForward
from ..method import Rounding
from .layers import rounded_input
from .moments import Group, Means, Moments, Sums, groups_of, sums_of, watching


class LayerByLayer(Rounding):
    """Rounds layers that are given the same, before those behind them are given theirs."""

    sums: ClassVar[Any] = Moments

    def apply(self, model: nn.Module, scheme: Scheme, data: Data) -> None:
        groups = groups_of(model, data, f"{self.name}: finding layers")
        run_layer_by_layer(model, groups, data, self.sums, self.round_group, self.name)

    @abstractmethod
    def round_group(self, group: Group, sums: Any) -> None:
        """Round the layers of a group, from the sums of what they are given."""


def run_layer_by_layer(
    model: nn.Module,
    groups: Sequence[Group],
    data: Data,
    make: Callable[[int, torch.device], Sums],
    visit: Callable[[Group, Sums], None],
    what: str,
) -> None:
    """Visit groups in their order, with the sums of what the model makes of data up to there.

    The forwards of all batches go on together, so that each of them runs once; it takes the memory
    of as many hidden states as there are batches, and as many threads, which wait for each other.
    Where a layer is called more than once, batches take different ways or the system gives no more
    threads, it is a pass for each group instead.
    """
    alike = all(group.calls == 1 for group in groups)
    with ExitStack() as undo:
        undo.enter_context(evaluating(model))
        walk = _Walk(model, data if alike else Data(()), undo)
        undo.enter_context(watching([group.leader for group in groups], walk.see))
        for group in track(groups, what, data.progress):
            sums = make(group.inputs, group.leader.weight.device)
            if not (alike and walk.reach(group.leader, sums)):
                alike = False
                undo.close()
                (sums,) = sums_of(model, [group], data, make)
            visit(group, sums)


class _Walk:
    """The forwards of all batches, on their way from the leader of one group to the next."""

    def __init__(self, model: nn.Module, data: Data, undo: ExitStack) -> None:
        self._forwards = []
        for batch in data.batches:
            forward = SteppedForward[nn.Module](partial(forward_batches, model, [batch], data.mask))
            forward.stop_at_the_end_of(undo)
            self._forwards.append(forward)

    def reach(self, leader: Any, sums: Means | Moments) -> bool:
        """Let all batches go on to a leader, and sum what it is given; tell if all came there."""
        self._leader, self._sums = leader, sums
        for forward in self._forwards:
            self._running = forward
            try:
                if forward.advance() is not leader:
                    return False
            except NoThread:
                return False
        return True

    def see(self, module: Any, x: Tensor) -> None:
        """Stop the forward that is under way; a hook of leaders."""
        if module is self._leader:
            self._sums.add(x, rounded_input(module, x))
        self._running.wait_at(module)
