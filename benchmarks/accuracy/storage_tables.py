"""Tables of what is stored in fewer bits: weights alone, and keys and values."""

from collections import defaultdict
from typing import Any

from benchmarks.accuracy.tables import bold
from benchmarks.markdown_table import table
from quanttune.report.results_table import DIGITS, cells_of

PREFIX = "weights in groups of 64: "  # of ways.py


def weights_section(measured: Any) -> str:
    """Return the table of a run of ways.py with weights alone."""
    rows = [
        (
            f"{row['split']}: {row['way'].replace(PREFIX, '').replace('nothing', 'nearest')}",
            f"{row['perplexity']:.2f}",
            f"{row['last_token_accuracy']:.1f}",
            f"{row['bytes'] / 1e6:.1f}",
            str(row.get("seconds", "")),
        )
        for row in measured["rows"]
    ]
    heads = ("", "perplexity", "last token, %", "MB", "seconds")
    return f"""## Weights alone on SmolLM2

Groups of 64 inputs, activations in float, head and embeddings in float32 (113 MB). Bytes of codes,
scales and what is float32. Seconds of quantizing and measuring, on a machine that was busy with
other work: they tell dear from cheap, no more. One seed.

{table(heads, rows)}
"""


def mixed_widths_section(name: str, measured: Any) -> str:
    """Return the table of a run of mixed_widths.py: a row per way, a column per budget and arm."""
    values: dict[Any, list[float]] = defaultdict(list)
    for row in measured["rows"]:
        widths = "one width" if row["widths"] == "one" else "allocated widths"
        way = " + ".join([widths, *row["methods"]])
        values[way, row["budget"], row["arm"]].append(row["value"])
    floats = {arm: found for (_, budget, arm), found in values.items() if budget == 32}
    cells = zip(floats, cells_of(list(floats.values())), strict=True)
    digits = DIGITS[measured["metric"]]
    columns = list(dict.fromkeys((b, arm) for _, b, arm in values if b != 32))
    ways = list(dict.fromkeys(way for way, budget, _ in values if budget != 32))
    of_columns = [cells_of([values[way, *column] for way in ways]) for column in columns]
    rows = zip(ways, zip(*of_columns, strict=True), strict=True)
    lines = [(way, *(bold(cell, digits) for cell in row)) for way, row in rows]
    heads = ("", *(f"{budget} bits, {arm}" for budget, arm in columns))
    seeds = len({row["seed"] for row in measured["rows"]})
    exact = ", ".join(f"{arm} {cell.text(digits)}" for arm, cell in cells)
    return f"""## Mixed widths on {name}: {measured["metric"]} on the test rows

Seeds: {seeds}. Float: {exact}. Mean bits of a weight, one
width for all or by `allocate_bits` from 2 to 8; activations of 8 bits, min-max, coverage linear;
rounded to nearest or by gptq. Bold: the best of a column.

{table(heads, lines)}
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
