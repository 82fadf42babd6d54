"""Which tokens a prefix is made of, so that those behind it need the narrowest ranges."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from statistics import fmean
from typing import Any

from torch import Tensor, nn

from ..modules import QuantizedEmbedding, quantized_class_of
from ..running import forward_batches
from ..token_mask import inside
from .decoder import keep
from .kept_prefix import drop_prefix

_ROWS = 8  # of the first batch: enough to tell one token from another
_CANDIDATES = 6
_LONGEST = 3
_NARROWER = 0.02  # bits, a mean over the tensors: what another token has to be worth

See = Callable[[nn.Module, Tensor], None]


def choose(decoder: Any, model: nn.Module, data: Iterable[Any]) -> list[int]:
    """Return the tokens behind which inputs of Linear modules and norms have the least range.

    Those are tried that hold the largest value of most tensors and rows, and the one that begins
    texts; one after the other is added while the mean of log2 of the largest values falls.

    Raises:
        ValueError: the data are empty, or have no token ids by name.
    """
    batch = _first_rows(data)
    ids: Tensor = batch["input_ids"]
    holders: Counter[int] = Counter()

    def count(x: Tensor) -> None:
        holders.update(ids.gather(1, x.argmax(1, keepdim=True)).flatten().tolist())

    _range(model, batch, count)
    candidates = [token for token, _ in holders.most_common(_CANDIDATES)]
    begins = decoder.config.bos_token_id
    candidates += [] if begins is None or begins in candidates else [begins]
    chosen: list[int] = []
    narrowest = float("inf")
    while len(chosen) < _LONGEST:
        ranges = {c: _range_behind(decoder, model, batch, [*chosen, c]) for c in candidates}
        best = min(ranges, key=lambda token: ranges[token])
        if ranges[best] > narrowest - _NARROWER:
            break
        chosen, narrowest = [*chosen, best], ranges[best]
    return chosen


def _range_behind(decoder: Any, model: nn.Module, batch: Any, token_ids: list[int]) -> float:
    keep(decoder, token_ids)
    try:
        return _range(model, batch)
    finally:
        drop_prefix(model)


def _range(model: nn.Module, batch: Any, see: Callable[[Tensor], None] | None = None) -> float:
    """Return the mean over the tensors of log2 of the largest magnitude.

    see: is given the largest of each token of a tensor, (rows, tokens), and zeros for padding.
    """
    found: list[float] = []

    def look(module: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0].detach().abs()
        if (counted := inside(x, "input")) is not None:
            x = x.masked_fill(~counted, 0)
        largest = x.amax(-1)
        found.append(largest.max().clamp(min=1e-30).log2().item())
        if see is not None and largest.dim() == 2:
            see(largest)

    with ExitStack() as undo:
        for module in model.modules():
            if _is_looked_at(module):
                undo.callback(module.register_forward_pre_hook(look).remove)
        forward_batches(model, [batch])
    return fmean(found)


def _is_looked_at(module: nn.Module) -> bool:
    """Tell whether a module multiplies what it is given, or is a norm, whatever its class."""
    kind = quantized_class_of(module)
    if kind is not None:
        return kind is not QuantizedEmbedding
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.dim() == 1


def _first_rows(data: Iterable[Any]) -> dict[str, Tensor]:
    batch = next(iter(data), None)
    if batch is None:
        raise ValueError("data is empty: choosing a prefix needs a batch of token ids")
    if isinstance(batch, (tuple, list)) and batch:
        batch = batch[0]  # (inputs, labels)
    if isinstance(batch, Tensor):
        batch = {"input_ids": batch}
    if not isinstance(batch, Mapping) or "input_ids" not in batch:
        raise ValueError(
            "choosing a prefix needs batches that are tensors of token ids, or have input_ids: got "
            f"{type(batch).__name__}"
        )
    tensors = {name: x for name, x in batch.items() if isinstance(x, Tensor)}
    return {name: x[:_ROWS] if x.dim() else x for name, x in tensors.items()}
