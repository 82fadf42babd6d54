"""Eq. 3 in plain PyTorch, for any model."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.support.models import BATCH
from quanttune.reference import outlier_ratio
from quanttune.tuning.sites import observed_types

ALPHA = 0.5


class Reference:
    """Eq. 2 by plain hooks and autograd: every input and output counts each time it is seen."""

    def __init__(self, model: nn.Module, exclude: Sequence[str] = ()) -> None:
        self.terms: list[tuple[Tensor, Tensor]] = []  # a tensor, and the mean ratio of its samples
        self.versions: list[tuple[str, Tensor, int]] = []  # a site, and the tensor it sees
        self.outputs: list[Any] = []  # of Linear modules
        self.seen: set[str] = set()
        self.handles = []
        named = [
            getattr(model, getter)()
            for getter in ("get_classifier", "get_output_embeddings")
            if hasattr(model, getter)
        ]
        self.heads = {m for found in named for m in (found if type(found) is tuple else (found,))}
        for name, module in sites_of(model).items():
            if name in exclude:
                continue
            self.handles += [
                module.register_forward_pre_hook(self._input(name)),
                module.register_forward_hook(self._output(name)),
            ]

    def _input(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> Any:
            self.seen.add(name)
            return (self._see(name, args[0]), *args[1:]) if args else None

        return hook

    def _output(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if module not in self.heads:
                output = self._see(name, output)
            if isinstance(module, nn.Linear):
                self.outputs.append(output)
            return output

        return hook

    def _see(self, name: str, x: Any) -> Any:
        if not (isinstance(x, Tensor) and x.is_floating_point() and x.numel()):
            return x
        # a view of what is new tells whether the graph from here on reaches the loss
        y = x if any(x is known for known, _ in self.terms) else x.view_as(x)
        self.versions.append((name, y, y._version))
        samples = BATCH if len(y) % BATCH == 0 else 1
        # of a copy, so that the model may change y in place
        self.terms.append((y, outlier_ratio(y.clone(), samples).mean()))
        return y

    def loss(self, task: Tensor, output: Any) -> tuple[Tensor, int]:
        """Return eq. 3, and how many terms do not reach the task loss and have no gradient."""
        leaves = [id(leaf) for leaf in tensors_of(output)]
        logits = {id(y) for y in self.outputs if id(y) in leaves}
        self.terms = [(x, ratio) for x, ratio in self.terms if id(x) not in logits]
        tensors = [x for x, _ in self.terms if x.requires_grad]
        found = torch.autograd.grad(task, tensors, retain_graph=True, allow_unused=True)
        lost = {id(x) for x, g in zip(tensors, found, strict=True) if g is None}
        ratios = [ratio.detach() if id(x) in lost else ratio for x, ratio in self.terms]
        outlier = torch.stack(ratios).mean()
        return (1 - ALPHA) * task + ALPHA * outlier, sum(id(x) in lost for x, _ in self.terms)

    def changed(self) -> list[str]:
        """Return the sites that see a tensor that the model has changed in place since."""
        return sorted({name for name, x, version in self.versions if x._version != version})

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def tensors_of(output: Any) -> Iterator[Tensor]:
    """Yield the floating-point tensors of what a model returns."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, (dict, tuple, list)):
        for part in output.values() if isinstance(output, dict) else output:
            yield from tensors_of(part)


def sites_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return what quanttune is to observe, by qualified name."""
    types = observed_types()
    return {name: m for name, m in model.named_modules() if isinstance(m, types)}
