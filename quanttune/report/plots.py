"""Figures, drawn without a screen: from plain numbers to a matplotlib Figure.

They are narrow, with letters that a phone shows at a legible size.
"""

from collections.abc import Mapping, Sequence
from itertools import dropwhile
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from .figure import Plain

BLUE, RED, GRAY = "#3b6fb6", "#c8553d", "#8a8a8a"
# the arms of the demos: what QuantTune is about is drawn thick
_ARMS: dict[str, dict[str, Any]] = {
    "base": {"color": "black", "marker": "o"},
    "control": {"color": "0.6", "linewidth": 1, "linestyle": "--", "marker": "."},
    "qat8": {"color": "tab:green", "linewidth": 1, "linestyle": "--", "marker": "."},
    "qat6": {"color": "tab:olive", "linewidth": 1, "linestyle": "--", "marker": "."},
    "paper": {"color": "tab:blue", "marker": "s"},
    "detached": {"color": "tab:red", "marker": "D"},
    "refit": {"color": "tab:cyan", "marker": "^"},
    "recipe": {"color": "tab:orange", "marker": "v"},
    "rotated": {"color": "tab:purple", "marker": "P"},
}
_DULL = ("bert", "encoder", "decoder", "model", "layer", "layers", "blocks")
_KINDS = {
    "residual": RED, "norm": "#e0a458", "input": BLUE, "output": "#6fa8a0", "score": "#7d5ba6",
}  # fmt: skip


def draw_ranges(curves: Mapping[str, Mapping[str, float]], what: str) -> Figure:
    """Draw the largest magnitude per layer, a curve per model (Fig. 6 of the paper).

    curves: model -> layer -> max|x|.
    """
    layers = list(next(iter(curves.values())))
    figure, axes = _figure(3.6)
    for model, ranges in curves.items():
        heights = [ranges.get(layer, float("nan")) for layer in layers]
        axes.plot(heights, label=model, **{"marker": "o", "linewidth": 2, **_ARMS.get(model, {})})
    _scale(axes)
    _name(axes, layers)
    axes.set_ylabel("max |x|")
    axes.set_title(what, fontsize="medium")
    _legend(figure, axes)
    return figure


def draw_sweep(points: Sequence[Mapping[str, float]], metric: str, float_value: float) -> Figure:
    """Draw quality and both errors against the saturation threshold (Fig. 3 of the paper)."""
    figure, axes = _figure(3.6)
    places = range(len(points))
    for shift, part, color in ((-0.2, "saturation", BLUE), (0.2, "precision", RED)):
        heights = [100 * point[part] for point in points]
        bars = [place + shift for place in places]
        axes.bar(bars, heights, 0.4, color=color, label=f"{part} error", alpha=0.75)
    _scale(axes)
    axes.set_ylabel("error / variance (%)")
    _name(axes, [f"{point['percent']:.7g}" for point in points])
    axes.set_xlabel("values left untouched (%)")
    quality = axes.twinx()
    quality.plot([point["value"] for point in points], "o-", color="black", label=metric)
    quality.axhline(float_value, color="black", linestyle=":", linewidth=1, label="float model")
    quality.set_ylabel(metric)
    _legend(figure, axes, quality)
    return figure


def draw_blocks(
    divergences: Mapping[str, Sequence[float]], ranges: Mapping[str, Sequence[float]]
) -> Figure:
    """Draw relative precision loss and dynamic range per block (Fig. 4 of the paper).

    divergences, ranges: block -> (with the full range, saturated).
    """
    figure, axes = _figure(3.6)
    wide = axes.twinx()
    for i, (what, color) in enumerate((("full range", RED), ("saturated", BLUE))):
        heights = [pair[i] for pair in divergences.values()]
        places = [place + 0.4 * i - 0.2 for place in range(len(heights))]
        axes.bar(places, heights, 0.4, color=color, alpha=0.6, label=f"loss, {what}")
        lines = [ranges[block][i] if block in ranges else float("nan") for block in divergences]
        wide.plot(lines, "o-", color=color, label=f"range, {what}")
    axes.set_ylabel("relative precision loss, KL (nats)")
    _scale(wide)
    wide.set_ylabel("max |x| before the second norm")
    _name(axes, list(divergences))
    _legend(figure, axes, wide)
    return figure


def draw_channels(
    groups: Sequence[Mapping[str, float]], others: Sequence[Mapping[str, float]] = ()
) -> Figure:
    """Draw the spread of values in groups of channels, colored by their range (Fig. 2).

    others: groups of figures to compare with, which have the same colors and axes.
    """
    ranges = [group["high"] - group["low"] for group in (*groups, *others)]
    tiny = 1e-6 * max(ranges) or 1.0  # a constant channel has no range, and no logarithm
    colors = ScalarMappable(LogNorm(max(min(ranges), tiny), max(*ranges, tiny)), "coolwarm")
    figure, axes = _figure(3.2)
    boxes = axes.bxp([_box(group) for group in groups], patch_artist=True, widths=0.7)
    for i, shade in enumerate(colors.to_rgba(np.maximum(ranges[: len(groups)], tiny))):
        boxes["boxes"][i].set(facecolor=shade, linewidth=0.5)
        boxes["medians"][i].set(color="black")
        boxes["fliers"][i].set(marker="_", markeredgecolor=shade, markersize=6, markeredgewidth=2)
    axes.set_yscale("symlog", linthresh=1)
    axes.set_ylim(
        1.5 * min(-1, *(group["low"] for group in (*groups, *others))),
        1.5 * max(1, *(group["high"] for group in (*groups, *others))),
    )
    axes.yaxis.set_major_formatter("{x:g}")
    ticks = range(0, len(groups), 5)
    axes.set_xticks(
        [tick + 1 for tick in ticks], [str(int(groups[tick]["first"])) for tick in ticks]
    )
    axes.set_xlabel("first channel of the group")
    axes.set_ylabel("value (linear below 1)")
    bar = figure.colorbar(colors, ax=axes, label="range of the group", pad=0.02)
    _write_out(bar.ax)
    return figure


def _box(group: Mapping[str, float]) -> dict[str, Any]:
    return {
        "whislo": group["whisker_low"],
        "q1": group["quartile_low"],
        "med": group["median"],
        "q3": group["quartile_high"],
        "whishi": group["whisker_high"],
        "fliers": [group["low"], group["high"]],
    }


def draw_calibrators(values: Mapping[str, float], metric: str, float_value: float) -> Figure:
    """Draw quality per calibrator beside the float model (Fig. 5 of the paper)."""
    figure, axes = _figure(0.6 + 0.3 * len(values))
    bars = axes.barh(list(values), list(values.values()), color=BLUE, height=0.65)
    axes.bar_label(bars, fmt="%.3g", padding=3, fontsize="small")
    axes.axvline(float_value, color="black", linestyle=":", label="float model")
    low, high = min(0, *values.values()), max(float_value, *values.values())
    axes.set_xlim(low, 1.12 * high if high > low else low + 1)
    axes.invert_yaxis()
    axes.set_xlabel(metric)
    _legend(figure, axes)
    return figure


def draw_sensitivity(sites: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> Figure:
    """Draw the error of the output when one tensor is quantized, the worst first.

    names: what to call each kind of tensor.
    """
    figure, axes = _figure(0.9 + 0.22 * len(sites))
    for kind in dict.fromkeys(site["kind"] for site in sites):
        of_kind = [(i, site) for i, site in enumerate(sites) if site["kind"] == kind]
        axes.barh(
            [i for i, _ in of_kind],
            [100 * site["sensitivity"] for _, site in of_kind],
            color=_KINDS.get(kind, GRAY),
            label=names[kind],
        )
    axes.set_yticks(
        range(len(sites)), [short_site(site["site"]) for site in sites], fontsize="small"
    )
    axes.invert_yaxis()
    axes.set_xlabel("error of the output (%)")
    _legend(figure, axes)
    return figure


def draw_steps(steps: Sequence[Mapping[str, Any]], metric: str, float_value: float) -> Figure:
    """Draw what each step of a choice bought: bars from one value to the next.

    steps: each with its "recipe" and "value"; the first bar shows the first value as a line.
    """
    figure, axes = _figure(0.9 + 0.3 * len(steps))
    values = [step["value"] for step in steps]
    before = [values[0], *values[:-1]]
    axes.barh(
        range(len(steps)),
        [value - last for value, last in zip(values, before, strict=True)],
        left=before,
        color=BLUE,
        height=0.6,
    )
    axes.plot(values, range(len(steps)), "k|", markersize=12)
    axes.axvline(float_value, color="black", linestyle=":", label="float model")
    axes.set_yticks(range(len(steps)), [step["recipe"] for step in steps], fontsize="small")
    axes.invert_yaxis()
    if _is_wide(values):
        axes.set_xscale("log")
    axes.set_xlabel(metric)
    _legend(figure, axes)
    return figure


def draw_trials(trials: Sequence[Mapping[str, Any]], metric: str, float_value: float) -> Figure:
    """Draw candidates over the seconds until they were done, hollow where not on all rows.

    trials: each with "value" (None: not measured), "parts" of the rows, "seconds".
    """
    figure, axes = _figure(3.2)
    ends = np.cumsum([trial["seconds"] for trial in trials])
    most = max(trial["parts"] for trial in trials)
    for all_rows, face in ((True, BLUE), (False, "none")):
        points = [
            (end, trial["value"])
            for end, trial in zip(ends, trials, strict=True)
            if trial["value"] is not None and (trial["parts"] == most) == all_rows
        ]
        label = "on all rows" if all_rows else "left early"
        axes.scatter(*zip(*points, strict=True) if points else ((), ()), label=label,
                     facecolors=face, edgecolors=BLUE)  # fmt: skip
    axes.axhline(float_value, color="black", linestyle=":", label="float model")
    if _is_wide([trial["value"] for trial in trials if trial["value"] is not None]):
        _scale(axes)
    axes.set_xlabel("seconds")
    axes.set_ylabel(metric)
    _legend(figure, axes)
    return figure


def short_site(site: str) -> str:
    """Shorten encoder.layer.3.output.dense.input to 3.output.dense.input."""
    return ".".join(dropwhile(_DULL.__contains__, site.split(".")))


def _figure(height: float) -> tuple[Figure, Axes]:
    figure = Plain(figsize=(5.8, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _name(axes: Axes, layers: Sequence[str]) -> None:
    """Put short names below the axis, turned where they are long, and not all where many."""
    names = [_short(layer) for layer in layers]
    step = -(-len(names) // 26)
    turned = sum(map(len, names)) > 60
    axes.set_xticks(
        range(0, len(names), step),
        names[::step],
        fontsize="small",
        rotation=45 if turned else 0,
        ha="right" if turned else "center",
    )


def _legend(figure: Figure, *axes: Axes) -> None:
    handles = [handle for one in axes for handle in one.get_legend_handles_labels()[0]]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize="small"
    )


def _is_wide(values: Sequence[float]) -> bool:
    """Tell whether values want a logarithmic axis."""
    return min(values) > 0 and max(values) > 10 * min(values)


def _short(layer: str) -> str:
    """Shorten encoder.layer.3.attention.output.LayerNorm to 3.attention."""
    parts = [part for part in layer.split(".") if part not in (*_DULL, "output", "LayerNorm")]
    second = parts[-1:] and parts[-1].isdigit() and not layer.endswith(parts[-1])
    return ".".join(parts) + (".output" if second else "")


def _scale(axes: Axes) -> None:
    """Take logarithms, and write the numbers out."""
    axes.set_yscale("log")
    _write_out(axes)


def _write_out(axes: Axes) -> None:
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(LogFormatter())
