"""The attentions of timm's Vision Transformers, and the queries and keys that they multiply."""

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

NORMS = "q_norm", "k_norm"  # what queries and keys go through: Identity, if they have no norm


def attentions_of(model: nn.Module) -> dict[str, Any]:
    """Return the attentions of a model of timm by name.

    Raises:
        ValueError: it has none.
    """
    from timm.layers import Attention

    found = {n: m for n, m in model.named_modules() if isinstance(m, Attention)}
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no attention of timm's Vision Transformers (timm.layers."
            "Attention), whose queries and keys are known"
        )
    return found


def watch(model: nn.Module, see: Callable[[Tensor], None]) -> Iterator[RemovableHandle]:
    """Show queries and keys of each attention, (images, heads, tokens, channels), to `see`."""
    for attention in attentions_of(model).values():
        for name in NORMS:
            hook = getattr(attention, name).register_forward_hook(lambda *call: see(call[2]))
            yield hook
