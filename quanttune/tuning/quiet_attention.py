"""Attention that need not grow outliers to do nothing: clipped softmax, and gates of heads."""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..quantization.functional.scaled_dot_product import masked
from ..quantization.modules import Made
from ..quantization.state import refuse_quantized
from ..transaction import transaction

# attention of timm's ViT, DeiT and their like, BERT and OPT, and what names its heads
HEADS = {
    "Attention": "num_heads",
    "BertSelfAttention": "num_attention_heads",
    "OPTAttention": "num_heads",
}
GATES = ("heads", "all")
_SOFTMAX = {torch.softmax, Tensor.softmax, F.softmax}


class ClippedSoftmax(nn.Module):
    """Stretch probabilities to [gamma, zeta], and clip them to [0, 1]."""

    def __init__(self, gamma: float, zeta: float, alpha: float | None) -> None:
        super().__init__()
        self.gamma, self.zeta, self.alpha = gamma, zeta, alpha

    def forward(self, probability: Tensor) -> Tensor:
        gamma = self.gamma if self.alpha is None else -self.alpha / probability.shape[-1]
        return ((self.zeta - gamma) * probability + gamma).clamp(0, 1)


class HeadGates(nn.Module):
    """A gate for each head and token, of what the attention module is given."""

    def __init__(self, channels: int, heads: int, kind: str, open_share: float) -> None:
        super().__init__()
        self.heads, self.factor = heads, 1 / open_share
        inputs = channels if kind == "all" else channels // heads
        self.weight = nn.Parameter(torch.zeros(heads, inputs))
        self.bias = nn.Parameter(torch.full((heads,), math.log(open_share / (1 - open_share))))

    def forward(self, hidden: Tensor) -> Tensor:
        """Return factors (batch, heads, tokens, 1) of hidden states (batch, tokens, channels)."""
        if self.weight.shape[1] == hidden.shape[-1]:
            levels = F.linear(hidden, self.weight, self.bias)
        else:
            slices = hidden.unflatten(-1, (self.heads, -1))
            levels = (slices * self.weight).sum(-1) + self.bias
        return self.factor * levels.sigmoid().transpose(-2, -1).unsqueeze(-1)


def clip_softmax(
    model: nn.Module, gamma: float = -0.025, zeta: float = 1.0, alpha: float | None = None
) -> nn.Module:
    """Clip what softmax returns in each attention of timm's ViT, BERT or OPT, in place; return it.

    A head can then leave a token out without a score of minus infinity, which is what outliers are
    for. The model computes something else than before: train it with this. The probabilities of a
    query no longer add up to 1, and what was clipped gets no gradient. Files of weights are the
    same; whoever loads one calls this first, before `quanttune.load` too.

    Args:
        gamma: at most 0. The default is the paper's for BERT, of 128 tokens.
        zeta: at least 1.
        alpha: gamma is -alpha / keys in place of a constant; 12 is the paper's for OPT.

    Raises:
        ValueError: an argument is out of range, the model is quantized, or has no such attention.

    Source: Bondarenko et al., Quantizable Transformers, arXiv 2306.12929, eq. 4.
    """
    if gamma > 0 or zeta < 1 or (alpha is not None and alpha < 0):
        raise ValueError(
            f"gamma must be at most 0, zeta at least 1, alpha at least 0, got {gamma}, {zeta} and "
            f"{alpha}"
        )
    with transaction(model):
        for module in _attentions(model):
            module.clipped_softmax = ClippedSoftmax(gamma, zeta, alpha)
    return model


def gate_attention(model: nn.Module, kind: str = "heads", open_share: float = 0.25) -> nn.Module:
    """Multiply what each head returns by a learned gate, in place; return the model.

    The gate of a head and token is sigmoid(linear(hidden state)) / open_share, and 1 at the start,
    so that the model computes what it did. Its parameters, `head_gates` of each attention, are part
    of the model: make the optimizer afterwards; whoever loads them calls this first.

    Args:
        kind: "heads", where a head's gate sees its own slice of the hidden state, or "all", where
            it sees all of it.
        open_share: the sigmoid at the start; the paper's 0.25 leaves room to open.

    Raises:
        ValueError: an argument is out of range, the model is quantized, or has no such attention.

    Source: Bondarenko et al., Quantizable Transformers, arXiv 2306.12929, 4.2. Weights begin
    at zero, where theirs are small.
    """
    if kind not in GATES or not 0 < open_share < 1:
        raise ValueError(
            f"kind must be one of {', '.join(GATES)} and open_share between 0 and 1, got {kind!r} "
            f"and {open_share}"
        )
    with transaction(model):
        for module in _attentions(model):
            weight = next(p for p in module.parameters() if p.dim() == 2)
            heads = getattr(module, HEADS[_own_class(module).__name__])
            gates = HeadGates(weight.shape[1], heads, kind, open_share)
            module.head_gates = gates.to(weight.device, weight.dtype)
    return model


def _attentions(model: nn.Module) -> Iterator[Any]:
    """Yield the attention modules of a model, each ready to hold switches."""
    refuse_quantized(model)
    found: list[Any] = [m for m in model.modules() if _own_class(m).__name__ in HEADS]
    found = [m for m in found if hasattr(m, HEADS[_own_class(m).__name__])]
    if not found:
        raise ValueError(
            f"{type(model).__name__} has none of {', '.join(HEADS)}: switches are for timm's "
            "Vision Transformers, BERT and OPT"
        )
    for module in found:
        if not isinstance(module, _Switched):
            own: Any = type(module)  # to mypy a class of modules is not hashable
            module.__class__ = _switched(own)
        yield module


class _Switched(nn.Module):
    """Lets attention run under the switches that a module holds."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        with _Switches(self, hidden) as switches:
            result = super().forward(*args, **kwargs)
        if not switches.seen:
            raise RuntimeError(
                f"{type(self).__name__} computes attention in a way that switches do not see: take "
                'scaled_dot_product_attention (attn_implementation="sdpa", timm\'s fused attention)'
            )
        return result


class _Switches(TorchFunctionMode):
    def __init__(self, module: nn.Module, hidden: Tensor) -> None:
        super().__init__()
        self.hidden, self.seen = hidden, False
        self.clip: Callable[[Tensor], Tensor] | None = getattr(module, "clipped_softmax", None)
        self.gates: Callable[[Tensor], Tensor] | None = getattr(module, "head_gates", None)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self.seen = True
            return self._attention(*args, **kwargs)
        result = func(*args, **kwargs)
        if func in _SOFTMAX and self.clip is not None and self.gates is None:
            self.seen = True
            return self.clip(result)
        return result

    def _attention(self, *args: Any, **kwargs: Any) -> Tensor:
        if self.clip is None:
            answer: Tensor = F.scaled_dot_product_attention(*args, **kwargs)
        else:
            answer = self._clipped(self.clip, *args, **kwargs)
        return answer if self.gates is None else answer * self.gates(self.hidden)

    def _clipped(
        self,
        clip: Callable[[Tensor], Tensor],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        # spelled out here: what stands in quantization.functional is one place for all products
        query = query * (query.shape[-1] ** -0.5 if scale is None else scale)
        if enable_gqa:
            groups = query.shape[-3] // key.shape[-3]
            key, value = (x.repeat_interleave(groups, -3) for x in (key, value))
        scores = query @ key.transpose(-2, -1)
        scores, seeing = masked(scores, attn_mask, is_causal)
        answer = F.dropout(clip(scores.softmax(-1)), dropout_p) @ value
        return answer if seeing is None else answer * seeing


def _own_class(module: nn.Module) -> type[nn.Module]:
    return type(module).__bases__[1] if isinstance(module, _Switched) else type(module)


@functools.cache
def _switched(own: Any) -> Any:
    members = {"__module__": own.__module__, "made_by": (_switched, (own,))}
    return Made(own.__name__, (_Switched, own), members)
