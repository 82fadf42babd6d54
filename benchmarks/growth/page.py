"""The tables and pictures of docs/growth.md."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter

from benchmarks.markdown_table import table
from quanttune.report.figure import Plain, svg
from quanttune.report.plots import BLUE, GRAY, RED

Points = list[dict[str, Any]]
WHAT = {
    "size": "million parameters; 1 x 128 tokens",
    "tokens": "tokens of a row, one row",
    "rows": "rows of 128 tokens",
    "layers": "sites; width 128, 4 x 128 tokens",
}
TIMES = {
    ("times, step", "plain"): ("training step", GRAY, "-"),
    ("times, step", "observed"): ("observed", RED, "-"),
    ("times, calibration", "forward"): ("forward", GRAY, "--"),
    ("times, calibration", "calibrated"): ("calibration", BLUE, "--"),
    ("times, calibration", "simulated"): ("simulated forward", BLUE, ":"),
}
MEMORY = {
    "memory, plain": ("training step", GRAY, "-"),
    "memory, observed": ("observed", RED, "-"),
    "memory, forward": ("forward", GRAY, "--"),
    "memory, calibrated": ("calibration", BLUE, "--"),
}


def along(axis: str, measured: Mapping[str, Any]) -> Points:
    """Return what was measured along an axis, the smallest first."""
    return [point for key, point in measured["points"].items() if key.startswith(f"{axis}: ")]


def growth_tables(measured: Mapping[str, Any]) -> str:
    """Return a picture and a table per axis."""
    return "\n\n".join(_section(axis, along(axis, measured)) for axis in WHAT)


def draw_growth(measured: Mapping[str, Any], folder: Path) -> None:
    """Write a picture per axis: times above, memory below."""
    folder.mkdir(exist_ok=True)
    for axis, what in WHAT.items():
        (folder / f"{axis}.svg").write_bytes(svg(_figure(along(axis, measured), axis, what)))


def value(axis: str, point: Mapping[str, Any]) -> float:
    """Return where a point lies along its axis."""
    if axis == "size":
        return float(point["times, step"]["parameters"]) / 1e6
    return float(point["times, step"]["sites"] if axis == "layers" else point[axis])


def _section(axis: str, points: Points) -> str:
    heads = (
        WHAT[axis].split(";")[0].split(",")[0].capitalize(),
        "step, ms",
        "observed",
        "forward, ms",
        "calibration",
        "simulated",
        "memory of a step, MiB",
        "observed",
        "the first time",
        "of a forward, MiB",
        "calibration",
    )
    rows = [_cells(axis, point) for point in points]
    return f"![Time and memory by {WHAT[axis]}](growth/{axis}.svg)\n\n{table(heads, rows)}"


def _cells(axis: str, point: Mapping[str, Any]) -> tuple[str, ...]:
    step, calibration = point["times, step"], point["times, calibration"]
    forward = calibration["forward"]
    return (
        f"{value(axis, point):,.0f}",
        f"{step['plain']:,.0f}",
        f"{step['observed'] / step['plain']:.2f}x",
        f"{forward:,.1f}",
        f"{calibration['calibrated'] / forward:.2f}x",
        f"{calibration['simulated'] / forward:.2f}x",
        f"{point['memory, plain']:,.0f}",
        f"{point['memory, observed'] / point['memory, plain']:.2f}x",
        f"{point['memory, first observed'] / point['memory, plain']:.2f}x",
        f"{point['memory, forward']:,.0f}",
        f"{point['memory, calibrated'] - point['memory, forward']:+,.0f}",
    )


def _figure(points: Points, axis: str, what: str) -> Plain:
    figure = Plain(figsize=(5.8, 6.4), layout="constrained")
    above, below = figure.subplots(2, sharex=True)
    places = [value(axis, point) for point in points]
    for (kind, name), looks in TIMES.items():
        _curve(above, places, [point[kind][name] for point in points], looks)
    for kind, looks in MEMORY.items():
        _curve(below, places, [point[kind] for point in points], looks)
    above.set_ylabel("milliseconds")
    below.set_ylabel("MiB above the loaded model")
    below.set_xlabel(what)
    below.set_xticks(places, [f"{place:,.0f}" for place in places])
    below.minorticks_off()
    figure.legend(
        handles=above.get_legend_handles_labels()[0],
        loc="outside lower center",
        ncols=3,
        frameon=False,
        fontsize="small",
    )
    return figure


def _curve(
    axes: Axes, places: list[float], heights: list[float], looks: tuple[str, str, str]
) -> None:
    label, color, style = looks
    axes.loglog(places, heights, label=label, color=color, linestyle=style, marker="o")
    axes.spines[["top", "right"]].set_visible(False)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
