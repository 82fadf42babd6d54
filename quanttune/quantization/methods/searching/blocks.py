"""Blocks of a model, such as the layers of an encoder, whose scales are searched together."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ...functional.iteration import children_of
from ...running import main_output
from ...token_mask import inside
from .candidates import Activation, Weight
from .metrics import Metric
from .products import Attention, Linears, Records, Result, Searched, See


@dataclass(frozen=True)
class Block:
    """A module of a stack, and the products in it."""

    module: nn.Module
    linears: list[Linears]
    attentions: list[Attention]

    def watch(self, records: Records, see: See) -> Iterator[Callable[[], None]]:
        """Fill records with the arguments of its calls and what comes of them, show results, and
        yield what ends it.
        """

        given: list[tuple[Any, Any, list[int]]] = []  # of the call under way

        def take(_: nn.Module, args: Any, kwargs: Any) -> None:
            given.append((args, kwargs, _versions((args, kwargs))))

        def follow(module: nn.Module, _: Any, __: Any, output: Any) -> Any:
            args, kwargs, versions = given.pop()
            if _versions((args, kwargs)) != versions:
                raise ValueError(
                    f"{type(module).__name__} changes what it is given in place, so that it cannot "
                    "be run again: take another method, such as ptq4vit"
                )
            value = main_output(output)
            records.calls.append((args, kwargs))
            records.right.append(value.detach().float().clone())
            records.counted.append(inside(value, "output"))
            see(Result(module, value, False, None))
            return output.clone() if isinstance(output, Tensor) else output

        yield self.module.register_forward_pre_hook(take, with_kwargs=True).remove
        yield self.module.register_forward_hook(follow, with_kwargs=True).remove


def _versions(given: Any) -> list[int]:
    """Return how often each tensor was changed in place."""
    return [leaf._version for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]


def blocks_of(model: nn.Module, searched: Sequence[Searched]) -> tuple[list[Block], list[Searched]]:
    """Return the blocks that attention's products are in, and the products that are in none.

    A block is the innermost element of a ModuleList or Sequential that holds such a product.
    """
    stacks = (m for m in model.modules() if isinstance(m, (nn.ModuleList, nn.Sequential)))
    parts = {element: set(element.modules()) for stack in stacks for element in stack.children()}

    def home(modules: set[nn.Module], among: Sequence[nn.Module]) -> nn.Module | None:
        holding = (element for element in among if modules <= parts[element])
        return min(holding, key=lambda element: len(parts[element]), default=None)

    attentions = [one for one in searched if isinstance(one, Attention)]
    homes = [home({one.module}, list(parts)) for one in attentions]
    found = {module: Block(module, [], []) for module in homes if module is not None}
    others: list[Searched] = []
    for one in searched:
        if isinstance(one, Attention):
            block = found.get(homes[attentions.index(one)])  # type: ignore[arg-type]
        else:
            modules = {layer.module for layer in one.layers}
            block = found.get(home(modules, list(found)))  # type: ignore[arg-type]
        if block is None:
            others.append(one)
        elif isinstance(one, Attention):
            block.attentions.append(one)
        else:
            block.linears.append(one)
    return list(found.values()), others


class BlockSearch:
    """Searches the scales of a block by what the block returns, all else in it rounded as it is."""

    def __init__(self, block: Block, metric: Metric, factors: Sequence[float]) -> None:
        self.block, self.metric, self.factors = block, metric, factors
        self.sites: list[_Site] = []
        self.weights = [
            _WeightSite(Weight(x, factors)) for one in block.linears for x in one.layers
        ]
        for linears in block.linears:
            owners = [(layer.module, "input_quantizer") for layer in linears.layers]
            self.sites.append(_Site(Activation(linears.leader.input_quantizer), owners))
        for attention in block.attentions:
            for which in (0, 1):
                owners = [(attention.module, attention.names[which])]
                self.sites.append(_Site(Activation(attention.quantizer(which)), owners))

    @torch.no_grad()
    def run(self, records: Records, rounds: int, choices_of: Callable[[Activation], None]) -> None:
        """Let all sites and weights take turns, until nothing changes.

        choices_of: gives an activation what it may be rounded to.
        """
        for site in self.sites:
            choices_of(site.activation)
        sites = [site for site in self.sites if site.activation.is_searched]
        # kinds of grids before scales, which would make up for the calibrated one
        kinds = [site for site in sites if site.activation.choices[-1].grid != "uniform"]
        turns: list[_Site | _WeightSite] = [*kinds, *self.weights]
        turns += [site for site in sites if site not in kinds]
        for _ in range(rounds):
            changed = [turn.choose(lambda: self._loss(records)) for turn in turns]
            if not any(changed):
                break

    def install(self) -> None:
        """Let the model round as was found best."""
        for weight in self.weights:
            weight.weight.install()
        for site in self.sites:
            site.activation.install(site.owners)

    def _loss(self, records: Records) -> float:
        products = records.products(self.block.module, records.right)
        sums = [
            self.metric.sums(
                product, main_output(self.block.module(*args, **kwargs)).float(), False
            )
            for product, (args, kwargs) in zip(products, records.calls, strict=True)
        ]
        return self.metric.of(sums).item()


class _Site:
    """An activation, and the modules that round it."""

    def __init__(self, activation: Activation, owners: list[tuple[nn.Module, str]]) -> None:
        self.activation, self.owners = activation, owners
        self._before = [children_of(owner).get(name) for owner, name in owners]

    def choose(self, loss: Callable[[], float]) -> bool:
        """Take what loses the least, let the modules round so, and tell whether it is another."""

        def loss_of(choice: int) -> float:
            self._put(choice)
            return loss()

        changed = self.activation.choose(loss_of)
        self._put(self.activation.chosen)
        return changed

    def _put(self, choice: int) -> None:
        for (owner, name), before in zip(self.owners, self._before, strict=True):
            children_of(owner)[name] = self.activation.choices[choice] if choice else before


class _WeightSite:
    """A weight whose scales are all multiplied with one factor."""

    def __init__(self, weight: Weight) -> None:
        self.weight = weight

    def choose(self, loss: Callable[[], float]) -> bool:
        """Take the factor that loses the least, and tell whether it is another one."""
        chosen, quantizer = self.weight.chosen, self.weight.layer.quantizer
        before = least = int(chosen.flatten()[0])
        losses = {}
        for choice in range(len(self.weight.choices)):
            quantizer.scale = self.weight.scale_of(choice)
            losses[choice] = loss()
        for choice, value in losses.items():
            least = choice if value < losses[least] else least
        chosen.fill_(least)
        quantizer.scale = self.weight.scale_of(least)
        return least != before
