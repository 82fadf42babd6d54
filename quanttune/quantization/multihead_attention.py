"""A quantized nn.MultiheadAttention, whose own forward hides all that it multiplies."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


class QuantizedMultiheadAttention(nn.MultiheadAttention):
    """MultiheadAttention, in operations that functional sites see.

    Its projections of queries, keys and values are products with parameters, which a
    `RoundsParameters` in front of this class has rounded; `out_proj` is a module, and called.
    """

    # what the fused layers of torch.nn.TransformerEncoder ask before they pass this forward by
    _qkv_same_embed_dim = property(lambda self: False)  # type: ignore[assignment]

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        self._check(query, key, value, attn_mask, is_causal)
        batched = query.dim() == 3
        mask = _merged(attn_mask, key_padding_mask, self.num_heads, query)
        query, key, value = self._project(query, key, value, batched)
        key, value = self._extend(key, self.bias_k), self._extend(value, self.bias_v)
        if mask is not None and (more := key.shape[-2] - mask.shape[-1]):
            mask = F.pad(mask, (0, more))
        dropout = self.dropout if self.training else 0.0
        if need_weights:
            attended, weights = _attend(query, key, value, mask, dropout)
        else:
            attended = F.scaled_dot_product_attention(query, key, value, mask, dropout)
            weights = None
        output = self.out_proj(attended.permute(2, 0, 1, 3).flatten(2))  # (tokens, samples, width)
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if batched:
            return output.transpose(0, 1) if self.batch_first else output, weights
        return output.squeeze(1), None if weights is None else weights.squeeze(0)

    def _check(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool
    ) -> None:
        if query.is_nested or key.is_nested or value.is_nested:
            raise ValueError("a quantized MultiheadAttention takes no nested tensors")
        if query.dim() not in (2, 3) or not query.dim() == key.dim() == value.dim():
            raise ValueError(
                "query, key and value must have 2 dimensions or, with samples, 3 each, got "
                f"{query.dim()}, {key.dim()} and {value.dim()}"
            )
        if is_causal and mask is None:
            raise ValueError("is_causal says what attn_mask is: give that too")

    def _project(
        self, query: Tensor, key: Tensor, value: Tensor, batched: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values of (samples, heads, tokens, channels)."""
        packed, bias = self.in_proj_weight, self.in_proj_bias
        if query is key is value and packed is not None:
            q, k, v = F.linear(query, packed, bias).chunk(3, -1)
        else:
            weights = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
            w_q, w_k, w_v = weights if packed is None else packed.chunk(3)
            b_q, b_k, b_v = (None, None, None) if bias is None else bias.chunk(3)
            q = F.linear(query, w_q, b_q)
            k = F.linear(key, w_k, b_k)
            v = F.linear(value, w_v, b_v)
        return self._split(q, batched), self._split(k, batched), self._split(v, batched)

    def _split(self, x: Tensor, batched: bool) -> Tensor:
        if not batched:
            x = x.unsqueeze(0)
        elif not self.batch_first:
            x = x.transpose(0, 1)
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _extend(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Append the tokens that `add_bias_kv` and `add_zero_attn` ask for."""
        if bias is not None:
            one = bias.view(1, self.num_heads, 1, self.head_dim)
            x = torch.cat([x, one.expand(len(x), -1, -1, -1)], 2)
        return F.pad(x, (0, 0, 0, 1)) if self.add_zero_attn else x


def _merged(
    attn_mask: Tensor | None, padding: Tensor | None, heads: int, query: Tensor
) -> Tensor | None:
    """Return what is added to scores of (samples, heads, queries, keys)."""
    if attn_mask is not None:
        attn_mask = _added(attn_mask, query.dtype)
        if attn_mask.dim() == 3:
            attn_mask = attn_mask.unflatten(0, (-1, heads))
    if padding is None:
        return attn_mask
    padding = _added(padding, query.dtype)
    padding = padding.view(-1, 1, 1, padding.shape[-1])
    # not +, which would be a sum of two activations
    return padding if attn_mask is None else attn_mask.sub(padding.neg())


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask in the form that is added: of bool, True takes no part."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -torch.inf)
    if not mask.is_floating_point():
        raise TypeError(f"masks must be bool or floating point, got {mask.dtype}")
    return mask


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float
) -> tuple[Tensor, Tensor]:
    """Attend, and return the probabilities too."""
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    if mask is not None:
        scores = scores.sub(mask.neg())
    weights = F.dropout(scores.softmax(-1), dropout)
    return weights @ value, weights
