"""Figures, drawn without a screen."""

from collections.abc import Mapping
from pathlib import Path
from statistics import mean

from matplotlib.figure import Figure

_COLORS = {
    "base": "black", "control": "0.6", "qat8": "tab:green", "qat6": "tab:olive",
    "paper": "tab:blue", "detached": "tab:red",
}  # fmt: skip
_MARKERS = {"base": "o", "paper": "s", "detached": "D"}


def plot_ranges(ranges: Mapping[int, Mapping[str, Mapping[str, float]]], path: Path) -> None:
    """Draw the largest magnitude that goes into each LayerNorm, per arm, as means over the seeds.

    ranges: seed -> arm -> LayerNorm -> max|x|. The counterpart of Fig. 6 of the paper.
    """
    arms = next(iter(ranges.values()))
    layers = list(next(iter(arms.values())))
    figure = Figure(figsize=(9, 4.8), layout="constrained")
    axes = figure.subplots()
    for arm in arms:
        heights = [mean(seed[arm][layer] for seed in ranges.values()) for layer in layers]
        tuned = arm in ("base", "paper", "detached")
        axes.plot(
            heights,
            label={"base": "base (before)"}.get(arm, arm),
            color=_COLORS.get(arm),
            marker=_MARKERS.get(arm, "."),
            linewidth=2 if tuned else 1,
            linestyle="-" if tuned else "--",
        )
    axes.set_yscale("log")
    axes.set_xticks(
        range(len(layers)), [_short(layer) for layer in layers], rotation=45, ha="right"
    )
    axes.set_ylabel("max |x| over the calibration rows")
    axes.set_title("Dynamic range of the residual stream: inputs of each LayerNorm")
    axes.grid(axis="y", which="both", alpha=0.3)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    figure.savefig(path, dpi=150)


def _short(layer: str) -> str:
    """Shorten encoder.layer.3.attention.output.LayerNorm to 3.attention."""
    dull = ("encoder", "decoder", "model", "layer", "layers", "blocks", "output", "LayerNorm")
    parts = [part for part in layer.split(".") if part not in dull]
    return ".".join(parts) + (".output" if parts[-1:] and parts[-1].isdigit() else "")
