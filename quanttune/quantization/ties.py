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
                for config in _tying(model):
                    config.tie_word_embeddings = False


def keep(model: nn.Module) -> Callable[[], None]:
    """Return what gives a model the parameters back that it has now, with the values of now."""
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    held = [(m, n, p) for m in model.modules() for n, p in m.named_parameters(recurse=False)]
    tying = list(_tying(model))

    def restore() -> None:
        for module, name, parameter in held:
            setattr(module, name, parameter)
        for config in tying:
            config.tie_word_embeddings = True
        model.load_state_dict(values)

    return restore


def _tying(model: nn.Module) -> Iterator[Any]:
    """Yield the configurations of transformers that say that word embeddings are tied."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if getattr(config, "tie_word_embeddings", False):
            yield config
