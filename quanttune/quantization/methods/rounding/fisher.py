"""What errors of a weight cost the answer of the model, where others ask for those of its layer."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...running import Data, evaluating, in_float, main_output, requiring_gradients
from ...token_mask import counting, inside
from .layers import Layer, rounded_input

NO_GRADIENT = "what the model returns has no gradient: does it compute under no_grad?"
Call = tuple[nn.Module, Tensor, Tensor]  # of a layer, what it multiplies and what it returns


def fishers_of(
    model: nn.Module, layers: Sequence[Layer], data: Data, what: str | None = None
) -> list[Tensor]:
    """Return for each layer the sum over samples of G^T G, G the gradient of its rows.

    It is the gradient of what the model answers, each element with a random sign. On average over
    signs the sum is the Fisher information of a Gaussian around the answer, added up over rows; so
    it needs no labels. The model computes in float, but a layer multiplies rounded inputs. Samples
    are the first dimension of a layer's input, which in Swin are windows.

    Raises:
        ValueError: the answer has no gradient.

    Source: Edalati et al., OAC, arXiv 2405.15025, who take the gradient of a task's loss.
    """
    sums = {layer.module: _zeros(layer) for layer in layers}
    signs = torch.Generator().manual_seed(0)
    with in_float(model), evaluating(model), torch.enable_grad(), _calls_of(layers) as calls:
        for batch in data.track(what):
            with counting(model, batch, data.mask) as (args, kwargs):
                answer = signed_sum(main_output(model(*args, **kwargs)), signs)
            _add(sums, calls, answer)
            calls.clear()
    return list(sums.values())


def squared_gradients_of(
    model: nn.Module, layers: Sequence[Layer], data: Data, what: str | None = None
) -> list[Tensor]:
    """Return for each layer the sum over batches of the squared gradient of its weight, float32.

    It is the gradient of what the model answers in float, each element with a random sign.

    Raises:
        ValueError: the answer has no gradient.
    """
    weights = [layer.module.weight for layer in layers]
    sums = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
    signs = torch.Generator().manual_seed(0)
    with ExitStack() as undo:
        undo.enter_context(requiring_gradients(weights))
        for context in (in_float(model), evaluating(model), torch.enable_grad()):
            undo.enter_context(context)
        for batch in data.track(what):
            with counting(model, batch, data.mask) as (args, kwargs):
                answer = signed_sum(main_output(model(*args, **kwargs)), signs)
            if not answer.requires_grad:
                raise ValueError(NO_GRADIENT)
            found = torch.autograd.grad(answer, weights, materialize_grads=True)
            for total, gradient in zip(sums, found, strict=True):
                total += gradient.float().square()
    return sums


def _zeros(layer: Layer) -> Tensor:
    return torch.zeros(2 * [layer.inputs], dtype=torch.float64, device=layer.module.weight.device)


def signed_sum(answer: Tensor, generator: torch.Generator) -> Tensor:
    """Add up an answer with random signs, but for its padding."""
    signs = 2 * torch.randint(2, answer.shape, generator=generator).to(answer.device) - 1
    counted = inside(answer, "output")
    return (answer * (signs if counted is None else signs * counted)).double().sum()


def _add(sums: dict[nn.Module, Tensor], calls: Sequence[Call], answer: Tensor) -> None:
    """Add G^T G of each sample of a batch, where G sums over the calls of a layer."""
    if not (calls and answer.requires_grad):
        raise ValueError(NO_GRADIENT)
    found = torch.autograd.grad(answer, [y for *_, y in calls], materialize_grads=True)
    pairs: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}
    for (module, x, _), gradient in zip(calls, found, strict=True):
        pairs.setdefault(module, []).append((_samples(x), _samples(gradient)))
    for module, reached in pairs.items():
        x, gradient = (torch.cat(tensors, 1) for tensors in zip(*reached, strict=True))
        # X^T (g g^T X): G, of outputs * inputs, is there for one sample at a time
        spread = torch.stack([g @ (g.T @ one) for one, g in zip(x, gradient, strict=True)])
        sums[module].addmm_(x.flatten(0, 1).T, spread.flatten(0, 1))


def _samples(x: Tensor) -> Tensor:
    """Return float64 (samples, tokens, channels)."""
    return x.double().reshape(len(x), -1, x.shape[-1])


@contextmanager
def _calls_of(layers: Iterable[Layer]) -> Iterator[list[Call]]:
    """Yield a list of the calls of layers, which grows while the model runs."""
    calls: list[Call] = []

    def see(module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        calls.append((module, rounded_input(module, args[0].detach()), output))
        return output.clone()  # which may be changed in place

    with ExitStack() as undo:
        modules = [layer.module for layer in layers]
        # so that what they return has a gradient
        undo.enter_context(requiring_gradients(module.weight for module in modules))
        for module in modules:
            undo.callback(module.register_forward_hook(see).remove)
        yield calls
