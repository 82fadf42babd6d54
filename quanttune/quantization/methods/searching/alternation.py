"""One product's search: its factors take turns."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor

from ...quantizer import ActivationQuantizer
from .candidates import Activation, Weight
from .metrics import Metric, Product
from .products import Attention, Linears, Records


class LinearSearch:
    """Searches the scale of what several layers multiply, and those of their weights.

    before: what rounds the same tensor where a norm returns it, to its own range.
    """

    def __init__(
        self,
        linears: Linears,
        metric: Metric,
        factors: Sequence[float],
        before: ActivationQuantizer | None = None,
    ) -> None:
        self.metric, self.factors, self.before = metric, factors, before
        modules = [layer.module for layer in linears.layers]
        self.owners = [(module, "input_quantizer") for module in modules]
        self.inputs = Activation(linears.leader.input_quantizer)
        self.weights = [Weight(layer, factors) for layer in linears.layers]

    @torch.no_grad()
    def run(self, records: Records, rounds: int, is_twin: bool) -> None:
        """Let weights and inputs take turns, until nothing changes."""
        left, exact = records.left, []
        self.inputs.widen(self.factors)
        if is_twin:
            self.inputs.split(left, self.factors)
        for weight in self.weights:
            products = (x @ weight.rows.T for x in left)
            exact.append(list(records.products(weight.layer.module, products)))
        if self.before is not None:
            left = [self.before.round(x) for x in left]

        def choose_weights() -> bool:
            rounded = [self.inputs.rounded(x) for x in left]
            changed = [
                weight.choose(partial(self._loss, of, rounded))
                for weight, of in zip(self.weights, exact, strict=True)
            ]
            return any(changed)

        def choose_inputs() -> bool:
            rows = [weight.rounded() for weight in self.weights]

            def loss_of(choice: int) -> float:
                inputs = [self.inputs.rounded(x, choice) for x in left]
                pairs = zip(exact, rows, strict=True)
                return sum(self._loss(of, inputs, one).mean().item() for of, one in pairs)

            return self.inputs.choose(loss_of)

        take_turns(choose_weights, choose_inputs, rounds)

    def install(self) -> None:
        """Let the model round as was found best."""
        self.inputs.install(self.owners)
        for weight in self.weights:
            weight.install()

    def _loss(self, exact: Iterable[Product], inputs: Iterable[Tensor], rows: Tensor) -> Tensor:
        by_channel = self.weights[0].axis is not None
        pairs = zip(exact, inputs, strict=True)
        return self.metric.of([self.metric.sums(p, x @ rows.T, by_channel) for p, x in pairs])


class AttentionSearch:
    """Searches the scales of two activations that are multiplied."""

    def __init__(self, attention: Attention, metric: Metric, factors: Sequence[float]) -> None:
        self.attention, self.metric, self.factors = attention, metric, factors
        self.sides = [Activation(attention.quantizer(which)) for which in (0, 1)]

    @torch.no_grad()
    def run(self, records: Records, rounds: int, is_twin: bool) -> None:
        """Let both take turns, until nothing changes."""
        both = list(zip(records.left, records.right, strict=True))
        multiply = self.attention.multiply
        exact = list(records.products(self.attention.module, (multiply(*one) for one in both)))
        for side in self.sides:
            side.widen(self.factors)
        if is_twin:
            self.sides[0].split(records.left, self.factors)

        def choose(which: int) -> bool:
            side, other = self.sides[which], self.sides[1 - which]
            fixed = [other.rounded(pair[1 - which]) for pair in both]

            def loss_of(choice: int) -> float:
                pairs = [
                    (side.rounded(pair[which], choice), x)
                    for pair, x in zip(both, fixed, strict=True)
                ]
                made = [multiply(*pair[:: 1 - 2 * which]) for pair in pairs]
                sums = zip(exact, made, strict=True)
                return self.metric.of([self.metric.sums(*one, False) for one in sums]).item()

            return side.choose(loss_of)

        take_turns(partial(choose, 0), partial(choose, 1), rounds)

    def install(self) -> None:
        """Let the model round as was found best."""
        for side, name in zip(self.sides, self.attention.names, strict=False):
            side.install([(self.attention.module, name)])


def take_turns(one: Callable[[], bool], other: Callable[[], bool], rounds: int) -> None:
    """Let two factors choose, each for what the other has chosen, until nothing changes.

    Where one keeps its choice, that of the other was made for it already.
    """
    for turn in range(2 * rounds):
        changed = other() if turn % 2 else one()
        if turn and not changed:
            return
