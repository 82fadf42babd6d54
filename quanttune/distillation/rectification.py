"""Information rectification: queries and keys are normalized before they are rounded."""

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..quantization.running import forward_batches
from ..quantization.state import refuse_quantized
from ..transaction import transaction
from .attentions import NORMS, attentions_of

EPS = 1e-6


def rectify_attention(model: nn.Module, data: Iterable[Any]) -> nn.Module:
    """Normalize queries and keys in each attention of a timm Vision Transformer; return the model.

    Each head's vector gets mean 0 and deviation 1, and a learned factor and summand per channel
    (LayerNorm), so that all codes of a few bits are used. Factors and summands begin where queries
    and keys are nearest to what they were on `data` (least squares); the model computes something
    else all the same: train it, before it is quantized or after. Files of weights have new
    parameters, `q_norm` and `k_norm`: whoever loads one calls this first.

    Args:
        model: float; changed in place.
        data: batches, as `quantize` takes them.

    Raises:
        ValueError: the model is quantized, has no such attention or has norms there already, or
            data is empty.

    Source: Li et al., Q-ViT, arXiv 2210.06707, section 4.1.
    """
    refuse_quantized(model)
    attentions = attentions_of(model)
    for name, attention in attentions.items():
        if not all(isinstance(getattr(attention, norm), nn.Identity) for norm in NORMS):
            raise ValueError(f"{name} normalizes queries and keys already")
    fits: dict[tuple[str, str], _Fit] = {}
    with transaction(model), ExitStack() as undo:
        for name, attention in attentions.items():
            for norm in NORMS:
                fits[name, norm] = fit = _Fit()
                handle = getattr(attention, norm).register_forward_hook(fit.see)
                undo.callback(handle.remove)
        if not forward_batches(model, data):
            raise ValueError("data is empty: rectify_attention needs at least one batch of inputs")
    made = {place: fit.norm() for place, fit in fits.items()}
    with transaction(model):
        for (name, norm), module in made.items():
            setattr(attentions[name], norm, module)
    return model


class _Fit:
    """Sums over vectors of their channels, normalized and as they are, float64."""

    def __init__(self) -> None:
        self.count = 0
        self.sums: Tensor | None = None  # of z, y, z z, z y, (4, channels)
        self.like: Tensor | None = None

    def see(self, _: nn.Module, __: Any, output: Tensor) -> None:
        y = output.detach()
        z = F.layer_norm(y.float(), y.shape[-1:], eps=EPS)
        y, z = (x.reshape(-1, x.shape[-1]).double() for x in (y, z))
        sums = torch.stack([x.sum(0) for x in (z, y, z * z, z * y)])
        self.sums = sums if self.sums is None else self.sums + sums
        self.count, self.like = self.count + len(y), output

    def norm(self) -> nn.LayerNorm:
        """Return the norm whose outputs are nearest to its inputs."""
        assert self.sums is not None
        assert self.like is not None
        z, y, zz, zy = self.sums / self.count
        weight = (zy - z * y) / (zz - z * z).clamp_min(EPS)
        made = nn.LayerNorm(len(z), eps=EPS, device=self.like.device, dtype=self.like.dtype)
        with torch.no_grad():
            made.weight.copy_(weight)
            assert made.bias is not None
            made.bias.copy_(y - weight * z)
        return made
