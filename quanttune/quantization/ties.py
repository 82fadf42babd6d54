"""Parameters that several modules hold, and how they come apart."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn


def untie(model: nn.Module, modules: Iterable[nn.Module]) -> None:
    """Give modules parameters of their own where they share them; transformers is told."""
    holders: dict[nn.Parameter, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            holders[parameter] = holders.get(parameter, 0) + 1
    shared = {parameter for parameter, count in holders.items() if count > 1}
    for module in modules:
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter in shared:
                own = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
                setattr(module, name, own)
    for part, config in _tying(model):
        if hasattr(part, "get_output_embeddings"):
            ends = part.get_input_embeddings(), part.get_output_embeddings()
            if None not in ends and ends[0].weight is not ends[1].weight:
                config.tie_word_embeddings = False


def snapshot(model: nn.Module) -> Callable[[], None]:
    """Return what gives a model the parameters back that it has now, with the values of now."""
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    held = [(m, n, p) for m in model.modules() for n, p in m.named_parameters(recurse=False)]
    tying = [config for _, config in _tying(model)]

    def restore() -> None:
        for module, name, parameter in held:
            setattr(module, name, parameter)
        for config in tying:
            config.tie_word_embeddings = True
        model.load_state_dict(values)

    return restore


def _tying(model: nn.Module) -> Iterator[tuple[Any, Any]]:
    """Yield the modules of transformers whose configurations tie word embeddings, and these."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if getattr(config, "tie_word_embeddings", False):
            yield module, config
