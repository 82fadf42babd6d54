"""PyTorch's own dynamic quantization, beside ours: what one line gives a user, without data."""

import copy
import warnings
from importlib.util import find_spec

from torch import nn

NAME, BITS = "torch-dynamic", 8
CAVEAT = (
    f"{NAME}: PyTorch's dynamic quantization rounds Linear modules alone, each input by its own "
    "range, found anew at every call; attention, sums and embeddings stay in float."
)


def is_here() -> bool:
    """Tell whether this torch still has it: it was announced to go to torchao."""
    return find_spec("torch.ao.quantization") is not None


def quantized(model: nn.Module) -> nn.Module:
    """Return a quantized copy of a float model on the CPU, its weights per channel.

    On x86 without VNNI, PyTorch rounds activations to 7 bits, so that no product saturates.
    """
    from torch.ao.quantization import per_channel_dynamic_qconfig, quantize_dynamic

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*torch\.ao\.quantization is deprecated")
        warnings.filterwarnings("ignore", message=r".*quantized tensor creation functions")
        copied = copy.deepcopy(model).eval()
        done: nn.Module = quantize_dynamic(copied, {nn.Linear: per_channel_dynamic_qconfig})
    return done
