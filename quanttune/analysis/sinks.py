"""Attention sinks: tokens that most of the attention goes to, whatever is asked.

The word is from Xiao et al., arXiv 2309.17453.
"""

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..quantization.simulation import quantize
from .massive import IdOf, commonest
from .probes import sites_of, watch
from .survey import first_rows, rows_of

ROWS = 16
SHARE = 0.3  # of the attention of all queries and heads, that a sink gets
UNIFORM = 3.0  # times what it would get if each query saw all of its keys alike


def attention_sinks(model: nn.Module, data: Sequence[Any], id_of: IdOf) -> list[dict[str, Any]]:
    """Return which token of a sample gets the most attention, for each site where it is a sink.

    "attention" is its share and "uniform" what it would be without preference, means over the
    samples with a sink, of the first rows of the data.
    """
    batch = first_rows(data[0], ROWS)
    # only that coverage has sites that hold what a softmax returns
    seen = quantize(copy.deepcopy(model), data=[batch], coverage="full")
    kinds = {site: quantizer.kind for site, quantizer in sites_of(seen).items()}
    found: dict[str, list[tuple[int, int, float, float]]] = {}

    def see(site: str, x: Tensor, counted: Tensor | None) -> None:
        if kinds[site] == "probability" and x.shape[0] % rows_of(batch) == 0:
            found.setdefault(site, []).extend(sinks_in(x, counted, rows_of(batch)))

    watch(seen, [batch], see)
    return [{"site": site, **_describe(sinks, id_of)} for site, sinks in found.items() if sinks]


def sinks_in(x: Tensor, counted: Tensor | None, rows: int) -> list[tuple[int, int, float, float]]:
    """Return the sinks of probabilities: sample, token, its share, and the uniform share.

    x: (rows, ..., queries, keys), after masks. counted: which are of no padding.
    """
    x = x if counted is None else x.masked_fill(~counted, 0)
    x = x.reshape(rows, -1, *x.shape[-2:])
    seen = (x > 0).double()
    uniform = (seen / seen.sum(-1, keepdim=True).clamp(min=1)).mean(1)
    queries = (x.sum(-1) > 0).double().mean(1).sum(-1, keepdim=True).clamp(min=1)
    shares, uniform = x.double().mean(1).sum(1) / queries, uniform.sum(1) / queries
    tokens = shares.argmax(-1).tolist()
    sinks = [
        (row, t, shares[row, t].item(), uniform[row, t].item()) for row, t in enumerate(tokens)
    ]
    return [sink for sink in sinks if sink[2] >= max(SHARE, UNIFORM * sink[3])]


def _describe(sinks: Sequence[tuple[int, int, float, float]], id_of: IdOf) -> dict[str, Any]:
    token, token_share = commonest([token for _, token, _, _ in sinks])
    token_id, id_share = commonest([id_of(row, token) for row, token, _, _ in sinks])
    return {
        "token": token,
        "token_share": token_share,
        "id": token_id,
        "id_share": id_share,
        "attention": sum(share for *_, share, _ in sinks) / len(sinks),
        "uniform": sum(uniform for *_, uniform in sinks) / len(sinks),
        "samples": len(sinks),
    }
