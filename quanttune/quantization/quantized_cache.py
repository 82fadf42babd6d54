"""A cache of keys and values in 8 or 4 bits, for generate() of transformers."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

WIDTHS = (8, 4)


class QuantizedCache(Cache):
    """Keys and values of a language model in integers: `model.generate(..., cache=cache)`.

    Keys have a scale and an offset per channel and `block` tokens in a row, values per token, of
    each sequence and head. Attention computes in float with what they stand for. Tokens of the call
    under way are seen as they are (as in WKVQuant and KIVI), and so are the newest ones, until
    they fill a block; nothing is rounded twice, unless `crop` cuts into a block. Of layers with a
    sliding window, or a state instead of keys, what transformers keeps stays in float. Padding on
    the left counts in the scales of its own sequence.

    Args:
        config: of the model.
        bits: 8, or 4, two to a byte.
        block: tokens; fewer than these are held in float.

    Raises:
        ValueError: a width or size is none of these, or no layer attends to all tokens.

    Source: Liu et al., KIVI, arXiv 2402.02750; Yue et al., WKVQuant, arXiv 2402.12065.
    """

    def __init__(self, config: Any, bits: int = 8, block: int = 64) -> None:
        if bits not in WIDTHS:
            raise ValueError(f"bits must be one of {', '.join(map(str, WIDTHS))}, got {bits!r}")
        if type(block) is not int or block < 1:
            raise ValueError(f"block must be a number of tokens, such as 64, got {block!r}")
        usual: list[Any] = DynamicCache(config=config).layers
        layers = [_Layer(bits, block) if type(one) is DynamicLayer else one for one in usual]
        if not any(isinstance(layer, _Layer) for layer in layers):
            kinds = sorted({type(layer).__name__ for layer in layers}) or ["none"]
            raise ValueError(
                f"a quantized cache needs layers that attend to all tokens; those of "
                f"{type(config).__name__} are {', '.join(kinds)}"
            )
        super().__init__(layers=layers)

    @property
    def nbytes(self) -> int:
        """Bytes of all that is held, scales and what is in float included."""
        return sum(tensor.nbytes for layer in self.layers for tensor in _tensors(layer))


class _Codes:
    """Tensors of (batch, heads, tokens, channels) in integers, with scales over some dimension.

    over: what shares a scale: -2, `tokens` of one channel in a row; or -1, the channels of a token.
    """

    def __init__(self, bits: int, over: int, tokens: int) -> None:
        self.bits, self.over, self.tokens = bits, over, tokens
        self.clear()

    def clear(self) -> None:
        """Drop what is held."""
        self.held: list[Tensor] = []  # codes, steps and lowest values, all of them of tokens in -2
        self.length = 0

    def add(self, x: Tensor) -> None:
        """Round tokens, and append them."""
        groups = x.unflatten(-2, (-1, self.tokens)).float()
        low, high = torch.aminmax(groups, dim=self.over, keepdim=True)
        step = (high - low) / (2**self.bits - 1)
        # codes are of what is stored, in the type of x
        low, step = low.to(x.dtype), torch.where(step == 0, 1.0, step).to(x.dtype)
        codes = ((groups - low.float()) / step.float()).round().clamp(0, 2**self.bits - 1)
        codes = _packed(codes.flatten(-3, -2).to(torch.uint8), self.bits)
        new = [codes, step.flatten(-3, -2), low.flatten(-3, -2)]
        joined = [torch.cat(pair, -2) for pair in zip(self.held, new, strict=bool(self.held))]
        self.held = joined or new
        self.length += x.shape[-2]
        self.channels = x.shape[-1]

    def floats(self) -> list[Tensor]:
        """Return what the codes stand for; nothing of none."""
        if not self.length:
            return []
        codes, step, low = self.held
        groups = _unpacked(codes, self.bits)[..., : self.channels].unflatten(-2, (-1, self.tokens))
        x = groups * step.unsqueeze(-2).float() + low.unsqueeze(-2).float()
        return [x.flatten(-3, -2).to(low.dtype)]

    def take(self, tokens: int) -> Tensor:
        """Take tokens off the end, and return what they stood for."""
        (x,) = self.floats()
        self.length -= tokens
        kept = (self.length, self.length // self.tokens, self.length // self.tokens)
        self.held = [x[..., :n, :].clone() for x, n in zip(self.held, kept, strict=True)]
        return x[..., self.length :, :]

    def change(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change the sequences that are held."""
        self.held = [change(x) for x in self.held]


class _Layer(DynamicLayer):  # type: ignore[misc]
    """The keys and values of one layer: blocks of integers, and in `keys` and `values` the rest."""

    keys: Tensor
    values: Tensor

    def __init__(self, bits: int, block: int) -> None:
        super().__init__()
        self.block = block
        self.codes = _Codes(bits, -2, block), _Codes(bits, -1, 1)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        super().update(key_states, value_states)  # makes `keys` and `values` longer
        rests = self.keys, self.values
        keys, values = (
            torch.cat([*codes.floats(), rest], dim=-2)
            for codes, rest in zip(self.codes, rests, strict=True)
        )
        if full := self.keys.shape[-2] // self.block * self.block:
            for codes, rest in zip(self.codes, rests, strict=True):
                codes.add(rest[..., :full, :])
            # copies: what was rounded is to be freed
            self.keys, self.values = [rest[..., full:, :].clone() for rest in rests]
        return keys, values

    def get_seq_length(self) -> int:
        return self.codes[0].length + int(super().get_seq_length())

    def crop(self, tokens_to_remove: int) -> None:
        """Take tokens off the end, as many as a negative number says."""
        rest = self.keys.shape[-2] if self.is_initialized else 0
        missing = -(-(-tokens_to_remove - rest) // self.block) * self.block
        if (taken := min(missing, self.codes[0].length)) > 0:
            self.keys, self.values = (
                torch.cat([codes.take(taken), x], dim=-2)
                for codes, x in zip(self.codes, (self.keys, self.values), strict=True)
            )
        super().crop(tokens_to_remove)

    def reset(self) -> None:
        super().reset()
        for codes in self.codes:
            codes.clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._change(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._change(lambda x: x[indices, ...])

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.is_initialized:
            self.keys, self.values = change(self.keys), change(self.values)
            for codes in self.codes:
                codes.change(change)


def _tensors(layer: Any) -> list[Tensor]:
    held = [getattr(layer, name, None) for name in ("keys", "values")]
    held += [x for codes in getattr(layer, "codes", ()) for x in codes.held]
    return [x for x in held if isinstance(x, Tensor)]


def _packed(codes: Tensor, bits: int) -> Tensor:
    """Return codes of 4 bits two to a byte: those of the second half of the channels on top."""
    if bits == 8:
        return codes
    half = (codes.shape[-1] + 1) // 2
    top = torch.nn.functional.pad(codes[..., half:], (0, codes.shape[-1] % 2))
    return codes[..., :half] | (top << 4)


def _unpacked(packed: Tensor, bits: int) -> Tensor:
    return packed if bits == 8 else torch.cat([packed & 15, packed >> 4], dim=-1)
