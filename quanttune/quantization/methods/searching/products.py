"""The products of a model whose factors are searched, and what data make of them."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ...functional.iteration import Children, children_of
from ...functional.operations import Operation
from ...running import Data, evaluating, main_output, requiring_gradients, rounding_only
from ...state import state_of
from ...token_mask import counting, inside, select, without_padding
from ..rounding.fisher import NO_GRADIENT, signed_sum
from ..rounding.moments import Group
from .metrics import Product

# of attention: what is multiplied, what comes of it, and of which kind that is
_OF_ATTENTION = (("query", "key", "score", "score"), ("probability", "value", "answer", "operand"))


@dataclass
class Records:
    """What each batch gave a product: its factors, and of its results the gradients."""

    left: list[Tensor] = field(default_factory=list)
    right: list[Tensor] = field(default_factory=list)  # of attention; of a block, what it returns
    calls: list[tuple[Any, Any]] = field(default_factory=list)  # of a block: its arguments
    counted: list[Tensor | None] = field(default_factory=list)
    gradients: dict[nn.Module, list[Tensor]] = field(default_factory=dict)  # by what computes it
    results: int = 0  # bytes of what came of them
    is_product: bool = True  # False: what came of the factors is no matrix product of them

    def products(self, module: nn.Module, exact: Iterable[Tensor]) -> Iterator[Product]:
        """Yield what each batch makes of the exact factors."""
        for i, product in enumerate(exact):
            gradients = self.gradients.get(module)
            counted = self.counted[i] if self.counted else None
            yield Product(product, gradients[i] if gradients else None, counted)

    @property
    def bytes(self) -> int:
        """The memory that a search of them takes, at least."""
        return 2 * self.results + sum(4 * x.numel() for x in (*self.left, *self.right))


@dataclass(frozen=True)
class Result:
    """What a product of a forward is, and where its gradient goes."""

    module: nn.Module
    value: Tensor
    of_tokens: bool
    counted: Tensor | None

    def gradient(self, whole: Tensor) -> Tensor:
        """Return that part of a gradient that Records keep, as they keep it."""
        if not self.of_tokens:
            return whole
        return select(whole, self.counted).reshape(-1, whole.shape[-1]).float()


See = Callable[[Result], None]


class Linears:
    """Layers that multiply the same tensor."""

    def __init__(self, group: Group) -> None:
        self.group, self.layers, self.leader = group, group.layers, group.leader

    def watch(self, records: Records, see: See) -> Iterator[Callable[[], None]]:
        """Fill records while the model runs, show results, and yield what ends it."""

        def take(_: nn.Module, args: tuple[Any, ...]) -> None:
            x = without_padding(args[0].detach(), "input")
            records.left.append(x.reshape(-1, args[0].shape[-1]).float())

        def follow(module: nn.Module, _: Any, output: Tensor) -> Tensor:
            see(Result(module, output, True, inside(output, "output")))
            return output.clone()  # which may be changed in place

        yield self.leader.register_forward_pre_hook(take).remove
        for layer in self.layers:
            yield layer.module.register_forward_hook(follow).remove


class Attention:
    """A product of two activations, such as of queries and keys."""

    def __init__(self, module: nn.Module, operation: Operation, *parts: str) -> None:
        left, right, result, self.kind = parts
        self.module, self.is_transposed = module, right == "key"
        self.names = [operation.quantizer(part) for part in (left, right, result)]
        self.is_score = self.kind == "score" and "score" in operation.kinds

    def quantizer(self, which: int) -> nn.Module | None:
        """Return what rounds a factor."""
        return children_of(self.module).get(self.names[which])

    def multiply(self, left: Tensor, right: Tensor) -> Tensor:
        """Multiply factors, of grouped queries each key with several heads."""
        if left.dim() > 2 and left.dim() == right.dim() and left.shape[-3] != right.shape[-3]:
            right = right.repeat_interleave(left.shape[-3] // right.shape[-3], -3)
        return left @ (right.transpose(-2, -1) if self.is_transposed else right)

    def _makes(self, left: Tensor, right: Tensor, result: Tensor) -> bool:
        """Tell whether a result is what `multiply` makes; einsum may sum over other dimensions."""
        inner, outer = (-1, -2) if self.is_transposed else (-2, -1)
        batches = zip(left.shape[:-2], right.shape[:-2], strict=False)
        if (
            left.dim() != right.dim()
            or left.shape[-1] != right.shape[inner]
            or result.shape != (*left.shape[:-1], right.shape[outer])
            or any(a % b for a, b in batches)
        ):
            return False
        made = self.multiply(left, right)
        return torch.allclose(made, result, rtol=1e-3, atol=1e-3 * result.abs().max().item())

    def watch(self, records: Records, see: See) -> Iterator[Callable[[], None]]:
        """Do what `Linears.watch` does."""
        children = children_of(self.module)
        for name, seen in zip(self.names[:2], (records.left, records.right), strict=True):
            yield from _probed(children, name)
            probe: Any = children[name]
            hook = probe.register_forward_pre_hook(
                lambda _, args, seen=seen: seen.append(args[0].detach().float())
            )
            yield hook.remove

        def follow(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            factors = records.left[-1], records.right[-1]
            records.is_product &= self._makes(*factors, output.detach().float())
            records.counted.append(inside(output, self.kind))
            see(Result(self.module, output, False, None))
            return output.clone()

        yield from _probed(children, self.names[2])
        result: Any = children[self.names[2]]
        yield result.register_forward_hook(follow).remove


Searched = Linears | Attention


def _probed(children: Children, name: str) -> Iterator[Callable[[], None]]:
    """Put something that can be watched where nothing rounds; yield what takes it away."""
    if children.get(name) is None:
        children[name] = nn.Identity()
        yield partial(children.__delitem__, name)


def attentions_of(model: nn.Module) -> list[Attention]:
    """Return the products of a quantized model that no Linear computes, and that are rounded."""
    found = []
    for module, calls in state_of(model).calls():
        for operation in calls.operations.values():
            if operation.name is None or operation.weight is not None:
                continue
            if operation.name.startswith("attention"):
                found += [Attention(module, operation, *parts) for parts in _OF_ATTENTION]
            elif operation.name.startswith("product"):
                kind = "score" if "score" in operation.kinds else "operand"
                found.append(Attention(module, operation, "left", "right", "score", kind))
    return found


class Watched(Protocol):
    """What records what it is given while a model runs."""

    def watch(self, records: Any, see: See) -> Iterator[Callable[[], None]]:
        """Fill records while the model runs, show results, and yield what ends it."""


def record(
    model: nn.Module, searched: Sequence[Watched], data: Data, with_gradients: bool
) -> list[Records]:
    """Run the float model over data, and return what each product was given.

    The gradient is that of what the model answers, each element with a random sign: on average
    over signs its squares weigh errors by what they do to the answer, without labels.
    """
    found = [Records() for _ in searched]
    signs = torch.Generator().manual_seed(0)
    with ExitStack() as undo:
        results: list[tuple[Records, Result]] = []
        undo.enter_context(evaluating(model))
        undo.enter_context(rounding_only(model))
        undo.enter_context(torch.set_grad_enabled(with_gradients))
        if with_gradients:
            undo.enter_context(requiring_gradients(model.parameters()))
        for one, records in zip(searched, found, strict=True):
            for end in one.watch(records, partial(_see, results, records)):
                undo.callback(end)
        for batch in data.batches:
            with counting(model, batch, data.mask) as (args, kwargs):
                answer = main_output(model(*args, **kwargs))
                total = signed_sum(answer, signs)
            if with_gradients:
                _keep_gradients(total, results)
            results.clear()
    return found


def _see(results: list[tuple[Records, Result]], records: Records, result: Result) -> None:
    records.results += 4 * result.value.numel()
    results.append((records, result))


def _keep_gradients(total: Tensor, results: Sequence[tuple[Records, Result]]) -> None:
    if not (results and total.requires_grad):
        raise ValueError(NO_GRADIENT)
    values = [result.value for _, result in results]
    gradients = torch.autograd.grad(total, values, materialize_grads=True)
    for (records, result), whole in zip(results, gradients, strict=True):
        kept = records.gradients.setdefault(result.module, [])
        kept.append(result.gradient(whole))
