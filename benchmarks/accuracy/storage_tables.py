"""Tables of what is stored in fewer bits: weights alone, and keys and values."""

from typing import Any

from benchmarks.markdown_table import table

PREFIX = "weights in groups of 64: "  # of ways.py


def weights_section(measured: Any) -> str:
    """Return the table of a run of ways.py with weights alone."""
    rows = [
        (
            f"{row['split']}: {row['way'].replace(PREFIX, '').replace('nothing', 'nearest')}",
            f"{row['perplexity']:.2f}",
            f"{row['last_token_accuracy']:.1f}",
            f"{row['bytes'] / 1e6:.1f}",
        )
        for row in measured["rows"]
    ]
    heads = ("", "perplexity", "last token, %", "MB")
    return f"""## Weights alone on SmolLM2

Groups of 64 inputs, activations in float, head and embeddings in float32 (113 MB). Bytes of codes,
scales and what is float32. One seed.

{table(heads, rows)}
"""


def caches_section(measured: Any) -> str:
    """Return the table of a run of caches.py."""
    rows = [
        (row["way"], f"{row['perplexity']:.2f}", f"{row['bytes_per_token']:,.0f}")
        for row in measured["rows"]
    ]
    return f"""## Keys and values in integers

{measured["model"]}, {measured["texts"]} texts of {measured["tokens"]:,} tokens (test rows, joined),
read {measured["step"]} at a time: what was read before is seen as it is in the cache. Bytes of all
layers; what is float, scales too, is float32.

{table(("", "perplexity", "bytes per token"), rows)}
"""
