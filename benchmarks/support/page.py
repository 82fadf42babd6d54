"""docs/support.md, from the results of the support matrix."""

from collections import Counter, defaultdict
from itertools import groupby
from typing import Any

from benchmarks.markdown_table import table
from benchmarks.support.batches import batches

Row = dict[str, Any]

NOT_CALLED = "not called in this forward"

MEANINGS = {
    "exact": "every gradient is that of eq. 3, and every site that the forward calls is observed",
    "partly": "the same, but the weights of some sites are used without calling them: see below",
    "refused": "`attach` says that there is nothing to observe",
    "wrong": "a gradient differs",
    "error": "a step with quanttune fails, and one without does not",
    "not run": "the model does not train without quanttune, in the small size that was tried",
    "left out": "too slow or too large for the limits of the script",
}

HEAD = """# Support

Every kind of model of timm {timm} and transformers {transformers} that we could make small, on
torch {torch}: {models} models are attached, and the gradient of every parameter is compared with
eq. 3 in plain PyTorch. Made by

    python -m benchmarks.support.matrix

which leaves a line per model in `benchmarks/results/support/support.json`. It goes on where it was
stopped; `--fresh` runs everything again, `--only 'timm/swin*/*'` some of it.

A site is a Linear, a LayerNorm, or transformers' Conv1D. Each model has random weights, few layers
where its constructor takes a depth, a small input, 3 samples; it is in training mode with
its own dropout, the same in each forward. The task loss is a weighted sum of all outputs, alpha is
0.5. The reference counts each input and output of a site each time it is seen, with hooks and
`quanttune.reference.outlier_ratio` on autograd. Two steps are compared. The error of a parameter's
gradient is relative to its norm, or to 1e-6 (float32: 1e-3) of the norm of all gradients where
that is larger. It may be 1e-5 in float64, as some models compute parts in
float32, and 1e-3 in float32, which is used where a model does not train in
float64.

This does not say that tuning helps a model. Where few of the parameters lie in sites, quanttune
sees little of it: of a convolutional network it sees the input of the last Linear, no more.
"""

IN_PLACE = """## Changes in place

PyTorch refuses a model that changes an observed tensor in place. Either the activation modules
must not (`for m in model.modules(): if hasattr(m, "inplace"): m.inplace = False`), or the sites
are excluded (`attach(model, exclude=[...])`). These models are compared with that, and the others
as they are:
"""

UNOBSERVED = """## What is not observed

Sites whose hooks do not fire. The number of a layer is written *; how many sites that makes is in
brackets.
"""


def page(result: dict[str, Any], situations: dict[str, Any] | None = None) -> str:
    """Return the page; `situations` are those of situations.py."""
    rows = dict(sorted(result["rows"].items(), key=lambda item: _order(*item)))
    libraries = list(dict.fromkeys(key.partition("/")[0] for key in rows))
    versions = result["environment"]["versions"]
    parts = [HEAD.format(models=len(rows), **versions)]
    if result["missing"]:
        parts.append(
            f"{result['missing']} models of `benchmarks/support/names.py` are not run yet.\n"
        )
    parts.append(_counts(rows, libraries))
    parts += [f"## {library}\n\n{_families(_of(rows, library))}" for library in libraries]
    parts += [_unobserved(rows), _in_place(rows), _lost(rows), _others(rows), _messages(rows)]
    if situations:
        parts.append(batches(situations))
    return "\n".join(parts)


def outcome(row: Row) -> str:
    """Return the outcome; a site that the forward does not call is no lack."""
    if row["outcome"] == "partly" and set(row["unobserved"]) == {NOT_CALLED}:
        return "exact"
    return str(row["outcome"])


def _order(key: str, row: Row) -> tuple[str, str]:
    return key.partition("/")[0], row["family"]


def _of(rows: dict[str, Row], library: str) -> dict[str, Row]:
    return {_name(key): row for key, row in rows.items() if key.startswith(f"{library}/")}


def _counts(rows: dict[str, Row], libraries: list[str]) -> str:
    found = {name: Counter(map(outcome, _of(rows, name).values())) for name in libraries}
    counts = {kind: [found[name][kind] for name in libraries] for kind in MEANINGS}
    lines = [(kind, *map(str, n), MEANINGS[kind]) for kind, n in counts.items() if any(n)]
    errors: dict[str, list[float]] = {"float64": [0.0], "float32": [0.0]}
    for row in rows.values():
        if outcome(row) in ("exact", "partly"):
            errors[row["dtype"]].append(row["error"])
    single = [_name(key) for key, row in rows.items() if row.get("dtype") == "float32"]
    largest = {dtype: f"{max(values):.1g}" for dtype, values in errors.items()}
    lonely = sum(outcome(row) == "exact" and row["sites"] == 1 for row in rows.values())
    return (
        f"{table(['', *libraries, 'meaning'], lines, numbers=len(libraries))}\n"
        f"\nOf the exact ones, {lonely} have a single site, the last Linear, of which only the "
        "input is observed.\n"
        f"\nLargest error of what is exact or partly so: {largest['float64']} in float64, "
        f"{largest['float32']} in float32 ({len(single)} models: {', '.join(single) or 'none'}).\n"
    )


def _families(rows: dict[str, Row]) -> str:
    lines = []
    for family, members in groupby(rows.items(), lambda item: str(item[1]["family"])):
        groups: dict[str, dict[str, Row]] = defaultdict(dict)
        for name, row in members:
            groups[outcome(row) + (" with a remedy" if "remedy" in row else "")][name] = row
        for text, group in groups.items():
            sites = _range("{}", [row["sites"] for row in group.values() if "sites" in row])
            share = _range("{:.0%}", [row["share"] for row in group.values() if "share" in row])
            lines.append((family, sites, share, text, ", ".join(group)))
    heads = "family", "sites", "parameters in them", "outcome", "models"
    return table(heads, lines, numbers=0) + "\n"


def _range(form: str, values: list[float]) -> str:
    ends = [form.format(value) for value in (min(values), max(values))] if values else []
    return " to ".join(dict.fromkeys(ends))


def _unobserved(rows: dict[str, Row]) -> str:
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for key, row in rows.items():
        for reason, patterns in row.get("unobserved", {}).items():
            sites = [f"`{p}`" + (f" ({n})" if n > 1 else "") for p, n in patterns.items()]
            found[reason, ", ".join(sites)].append(_name(key))
    pairs = sorted(found, key=lambda pair: (pair[0] == NOT_CALLED, pair))
    lines = [(*pair, ", ".join(found[pair])) for pair in pairs]
    return f"{UNOBSERVED}\n{table(('why', 'sites', 'models'), lines, numbers=0)}\n"


def _in_place(rows: dict[str, Row]) -> str:
    found: dict[str, list[str]] = defaultdict(list)
    for key, row in rows.items():
        if "remedy" in row:
            found[row["remedy"]].append(_name(key))
    lines = [f"- `{remedy}`: {', '.join(models)}" for remedy, models in found.items()]
    return "\n".join([IN_PLACE, *lines]) + "\n"


def _lost(rows: dict[str, Row]) -> str:
    found = [f"{_name(key)} ({row['lost']})" for key, row in rows.items() if row.get("lost")]
    return (
        "## Tensors that do not reach the loss\n\nThey count in L_out without a gradient, and the "
        "tuner names them after the first backward. How many instances: "
        f"{', '.join(found) or 'none'}.\n"
    )


def _others(rows: dict[str, Row]) -> str:
    models = Counter(kind for row in rows.values() for kind in row.get("others", {}))
    kinds = [f"{kind} {count}" for kind, count in models.most_common(30)]
    return (
        "## What is no site\n\nModules with parameters that are not observed, and how many of the "
        f"models have them: {', '.join(kinds)}; {max(len(models) - 30, 0)} other classes.\n"
    )


def _messages(rows: dict[str, Row]) -> str:
    found: dict[str, list[str]] = defaultdict(list)
    for key, row in rows.items():
        if row["outcome"] not in ("exact", "partly"):
            message = row.get("message") or f"{row['error']} in {row['parameter']}"
            found[f"{row['outcome']}: {message}"].append(_name(key))
    lines = [f"- {', '.join(models)}: {text}" for text, models in sorted(found.items())]
    return "\n".join(["## Messages\n", *lines]) + "\n"


def _name(key: str) -> str:
    return key.partition("/")[2]
