"""Tables of a run of rivals.py: every row of it, and what to take when so much must be integers."""

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.markdown_table import table
from benchmarks.rivals.ways import SCOPES

WIDTHS = (8, 7, 6)
# of our coverages
_SCOPES = {"linear_inputs": "linear", "linear": "attention", "linear_embedding": "attention"}
RIVAL, UNTRAINED, TUNED = "best free rival", "ours without training", "ours tuned"


@dataclass(frozen=True)
class Candidate:
    """A way to quantize at one width; chosen by one value, told by another."""

    column: str
    name: str
    scope: str
    plain: bool  # static, per tensor, no zero points
    bits: int
    chosen_by: float
    test: float


def rival_sections(here: Path, methods: Path) -> list[str]:
    """Return both sections, of the results in a folder and of methods.py's in another."""
    if not (here / "rivals-minilm.json").exists():
        return []
    rivals, refits, compared = (
        json.loads((folder / f"{name}-minilm.json").read_text())
        for folder, name in ((here, "rivals"), (here, "refit"), (methods, "methods"))
    )
    return [decision_section(rivals, refits, compared), rivals_section(rivals)]


def rivals_section(measured: Any) -> str:
    """Return the section of all rows of a run of rivals.py."""
    facts, versions = measured["environment"], measured["libraries"]
    named = ", ".join(f"{name} {found}" for name, found in versions.items())
    heads = (
        "library", "setting", "integer", "activations", "zero points", "weights", "bits", "MB",
        "validation", "test",
    )  # fmt: skip
    return f"""## Other libraries on {measured["task"]}: {measured["metric"]} to the float model

{facts["processor"]}, {facts["cores"]} cores, {facts["threads"]} threads; {named}. The same
160 rows calibrate each, those of the demo. "Integer" is what was seen to be rounded, not what was
asked for. MB: the file, or the weights in memory; empty where a library only simulates. ONNX
Runtime's "MatMul inputs" and "Linear inputs" are with weights per channel, uint8, reduced range and
outputs left out.

{table(heads, map(_line, measured["rows"]), 0)}
"""


def _line(row: Any) -> tuple[str, ...]:
    if row["bits"] == 32:
        what: tuple[str, ...] = ("", "", "", "", "float")
    else:
        zero = "yes" if row["zero_points"] else "no"
        width = f"W{row['weight_bits']}A{row['bits']}"
        integer = f"{row['scope']}; {row['note']}" if row["note"] else row["scope"]
        what = (integer, row["activations"], zero, row["weights"], width)
    if "reason" in row:
        return (row["library"], row["setting"], *what, "", "", f"did not run: {row['reason']}")
    size = "" if row["megabytes"] is None else f"{row['megabytes']:.0f}"
    values = (f"{row[split]:.4f}" for split in ("validation", "test"))
    return (row["library"], row["setting"], *what, size, *values)


def decision_section(rivals: Any, refits: Any, methods: Any) -> str:
    """Return the table that a user decides by, once for any grid and once for plain ones."""
    found = [*_of_rivals(rivals), *_of_refits(refits), *_of_methods(methods)]
    return f"""## What to take

MiniLM on the test rows, cosine to the float model. A way that rounds more counts in the rows above,
too. A rival's setting was chosen on validation rows; of ours it is the best committed row of this
page, so chosen on test rows, and the mean of its seeds. A dash: nothing was measured.
{_missing(rivals)}
Any grid:

{_decision_table(found)}

Only static grids with one scale per activation tensor and no zero points, which every integer
runtime executes:

{_decision_table([candidate for candidate in found if candidate.plain])}
"""


def _missing(measured: Any) -> str:
    """Return what is still to be measured, without which no best of rivals is certain."""
    left = measured.get("missing", {})
    names = ", ".join(f"{library} ({count})" for library, count in left.items())
    said = "Settings not measured yet, so the rivals' best may be better than what stands here"
    return f"\n**{said}:** {names}.\n" if names else ""


def _decision_table(found: list[Candidate]) -> str:
    columns, lines = (RIVAL, UNTRAINED, TUNED), []
    scopes = list(SCOPES)
    for place, scope in enumerate(scopes):
        for bits in WIDTHS:
            here = [c for c in found if c.bits == bits and c.scope in scopes[place:]]
            best = (
                max((c for c in here if c.column == column), key=_choice, default=None)
                for column in columns
            )
            cells = (f"{c.test:.3f} ({c.name})" if c else "-" for c in best)
            lines.append((SCOPES[scope], f"W{bits}A{bits}", *cells))
    return table(("what must be integer", "bits", *columns), lines, 0)


def _choice(candidate: Candidate) -> float:
    return candidate.chosen_by


def _of_rivals(measured: Any) -> Iterator[Candidate]:
    for row in measured["rows"]:
        if "test" in row and row["weight_bits"] == row["bits"] in WIDTHS:
            plain = row["activations"] == "static, per tensor" and not row["zero_points"]
            name = f"{row['library']}: {row['setting']}"
            values = row["validation"], row["test"]
            yield Candidate(RIVAL, name, row["scope"], plain, row["bits"], *values)


def _of_refits(measured: Any) -> Iterator[Candidate]:
    values: dict[Any, list[float]] = defaultdict(list)
    for row in measured["rows"]:
        if row["bits"] in WIDTHS and "alpha = 0" not in row["arm"]:  # that is the control
            steps = row["steps"] if row["learning_rate"] else 0
            values[row["arm"], steps, row["way"], row["bits"]].append(row["value"])
    for (arm, steps, way, bits), found in values.items():
        scope = _SCOPES.get(way.split(", ")[0], "everything")
        name = f"{arm}, {steps} steps; {way}" if steps else f"{arm}; {way}"
        column = TUNED if steps else UNTRAINED
        value = mean(found)
        yield Candidate(column, name, scope, "zero points" not in way, bits, value, value)


def _of_methods(measured: Any) -> Iterator[Candidate]:
    values: dict[Any, list[float]] = defaultdict(list)
    for row in measured["rows"]:
        if row["weight_bits"] == row["bits"] in WIDTHS:
            way = " + ".join(row["methods"]) or row["calibrator"]
            values[row["arm"], row["coverage"], way, row["bits"]].append(row["value"])
    for (arm, coverage, way, bits), found in values.items():
        scope = _SCOPES.get(coverage, "everything")
        column = UNTRAINED if arm == "base" else TUNED
        value = mean(found)
        yield Candidate(column, f"{arm}; {way}", scope, True, bits, value, value)
