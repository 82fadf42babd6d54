"""The part of docs/support.md on quantized models in other batches than those of calibration."""

from collections import Counter
from typing import Any

from benchmarks.markdown_table import table

SITUATIONS = {
    "left": "calibrated and called with a first sample that is padded on the left",
    "right": "the same, on the right",
    "one after many": "calibrated with 3 samples, called with 1",
    "many after one": "calibrated with 1 sample, called with 3",
    "longer": "called with 1.5 times the tokens that it was calibrated with",
}

HEAD = """## Quantized, in other batches

The same models, quantized to 8 bits (`full_no_softmax`) in evaluation mode, in float64 where they
run in it. A sample's answer in a batch and alone must be equal to 1e-5 of the largest number, on
torch {torch}, transformers {transformers}, timm {timm}. Made by
`python -m benchmarks.support.matrix --situations`, a line per model in
`benchmarks/results/support/situations.json`.
"""

MEANINGS = {
    "equal": "every sample has the answer that it has alone",
    "refused": "`quantize` says why not",
    "differs": "an answer differs, or is not finite",
    "error": "the quantized model raises, or `quantize` does what it should not",
    "not asked": "the float model itself raises, is not finite, or gives samples other answers",
}


def batches(result: dict[str, Any]) -> str:
    """Return the section."""
    rows = {name: row for name, row in result["rows"].items() if "situations" in row}
    outcomes = []
    for situation, text in SITUATIONS.items():
        counts = Counter(_kind(row["situations"][situation]) for row in rows.values())
        outcomes.append((text, *(str(counts[kind]) for kind in MEANINGS)))
    lines = [HEAD.format(**result["environment"]["versions"])]
    lines.append(table(("situation", *MEANINGS), outcomes))
    lines.append("\n" + "\n".join(f"- {kind}: {text}" for kind, text in MEANINGS.items()) + "\n")
    left = len(result["rows"]) - len(rows)
    lines.append(
        f"{len(rows)} models; {left} more are too large, too slow or do not train, and "
        f"{result.get('missing', 0)} are not run yet.\n"
    )
    lines += [_exceptions(rows), _floats(rows)]
    return "\n".join(lines)


def _kind(outcome: str) -> str:
    """Return which of MEANINGS an outcome is; "" for a situation that a model has not."""
    if outcome.startswith("an answer"):
        return "differs"
    return next((kind for kind in MEANINGS if outcome.startswith(kind)), "")


def _exceptions(rows: dict[str, Any]) -> str:
    found: dict[str, list[str]] = {}
    for name, row in rows.items():
        for situation, outcome in row["situations"].items():
            if _kind(outcome) in ("refused", "differs", "error"):
                found.setdefault(f"{situation}: {outcome}", []).append(name.partition("/")[2])
    lines = [f"- {', '.join(models)}: {text}" for text, models in sorted(found.items())]
    return "\n".join(["### What is not equal\n", *(lines or ["Nothing."])]) + "\n"


def _floats(rows: dict[str, Any]) -> str:
    known = {name: row for name, row in rows.items() if isinstance(row["integers"], list)}
    whole = [name for name, row in known.items() if row["integers"][1] == 1]
    lines = [
        "### What stays float\n",
        f"With coverage full, every product of {len(whole)} of {len(known)} models is one of "
        "integers. Of the others, what is named first:\n",
    ]
    others = []
    for name, row in known.items():
        parameters, products = row["integers"]
        if products != 1:
            shares = (f"{parameters:.1%}", f"{products or 0:.1%}")
            first = next((x for x in row["float"] if "no Linear" in x), "less than 1 % each")
            others.append((name.partition("/")[2], *shares, first))
    lines.append(table(("model", "parameters", "products", "float"), others, numbers=2))
    return "\n".join(lines) + "\n"
