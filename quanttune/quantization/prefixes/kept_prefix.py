"""What a model holds that keeps a prefix. Models without one know nothing of transformers here."""

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

NAME = "kept_prefix"  # of what a decoder holds
CACHES = ("cache", "past_key_values")  # the argument, in transformers since 5.24 and before


class KeptPrefix(nn.Module):
    """The prefix of a decoder: token ids (tokens,), and for every layer keys and values."""

    tokens: Tensor
    keys: Tensor  # (layers, heads, tokens, channels)
    values: Tensor

    def __init__(self, tokens: Tensor, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.handles: list[RemovableHandle] = []
        for name, tensor in (("tokens", tokens), ("keys", keys), ("values", values)):
            self.register_buffer(name, tensor)

    def __len__(self) -> int:
        return len(self.tokens)


def prefix_of(model: nn.Module) -> KeptPrefix | None:
    """Return the prefix that a model, or the decoder in it, keeps."""
    return next((m for m in model.modules() if isinstance(m, KeptPrefix)), None)


def prefix_length(model: nn.Module) -> int:
    """Return how many tokens a model keeps before those that it is called with."""
    return len(prefix_of(model) or ())


def drop_prefix(model: nn.Module) -> None:
    """Take the prefix out of a model, if it has one."""
    for module in model.modules():
        if isinstance(kept := getattr(module, NAME, None), KeptPrefix):
            for handle in kept.handles:
                handle.remove()
            delattr(module, NAME)
            return
