"""A page's sections for the results of a demo: arms x bits x calibrators, ranges, recipe."""

from collections.abc import Mapping
from itertools import groupby
from statistics import mean
from types import SimpleNamespace
from typing import Any

from .page import Bold, Picture, Section, Table, Text, facts_table
from .plots import draw_ranges
from .results_table import DIGITS, tabulate

CAPTION = (
    "Largest magnitude at the input of each LayerNorm, over the calibration rows: the dynamic "
    "range of the residual stream. The counterpart of Fig. 6 of the paper."
)


def demo_sections(results: Mapping[str, Any]) -> list[Section]:
    """Return the sections for what a demo's results.json holds."""
    ranges = mean_ranges(results)
    recipe = results["recipe"]
    return [
        Section(
            f"{results['task']}: {results['metric']} on the test rows",
            _lead(results),
            results["caveats"],
            [results_table(results)],
        ),
        Section(
            "Dynamic range per layer, before and after",
            pictures=[Picture(draw_ranges(ranges, "inputs of LayerNorm"), CAPTION)],
        ),
        Section(
            "Recipe",
            f"{recipe['steps']} optimizer steps each. Settings were chosen on validation rows.",
            tables=[_arms_table(recipe["arms"])],
        ),
        Section(
            "Environment",
            tables=[facts_table({**results["environment"], "seconds": results["seconds"]})],
        ),
    ]


def mean_ranges(results: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return arm -> layer -> max|x|, a mean over the seeds."""
    seeds = list(results["ranges"].values())
    return {
        arm: {layer: mean(seed[arm][layer] for seed in seeds) for layer in layers}
        for arm, layers in seeds[0].items()
    }


def results_table(results: Mapping[str, Any]) -> Table:
    """Return the table with a row per way to quantize and a column per arm."""
    table = tabulate(SimpleNamespace(**row) for row in results["rows"])
    digits = DIGITS[results["metric"]]
    groups = []
    for name, ways in groupby(table.cells, lambda way: way.group):
        rows = []
        for way in ways:
            texts = [(cell.text(digits), cell.best) for cell in table.cells[way]]
            rows.append((way.label, *(Bold(text) if best else text for text, best in texts)))
        groups.append((name, rows))
    return Table(("", *table.arms), groups)


def _lead(results: Mapping[str, Any]) -> str:
    seeds = len(results["ranges"])
    spread = " ± standard deviation" if seeds > 1 else ""
    return (
        f"Mean over {seeds} seed{'s' * (seeds > 1)}{spread}. Weights and activations are symmetric "
        "uniform integers, one scale per activation tensor, coverage full_no_softmax if not said. "
        "Bold: the best arm of a row."
    )


def _arms_table(arms: list[Mapping[str, Any]]) -> Table:
    rows = [
        (
            arm["name"],
            Text(arm["summary"]),
            f"{arm['learning_rate']:g}" if arm["learning_rate"] else "-",
            str(arm["alpha"] or "-"),
        )
        for arm in arms
    ]
    return Table((Text("arm"), Text("what it is"), "learning rate", "alpha"), [(None, rows)])
