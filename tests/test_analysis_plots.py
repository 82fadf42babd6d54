"""Figures hold the numbers they are given, with units and legends."""

import pytest
from matplotlib.colors import to_hex

from quanttune.demo.minilm import MiniLM
from quanttune.quantization.coverage import PRESETS
from quanttune.report.analysis_sections import NAMES
from quanttune.report.plots import (
    draw_blocks,
    draw_calibrators,
    draw_channels,
    draw_ranges,
    draw_sensitivity,
    draw_sweep,
    short_site,
)


def legend(figure):
    return [text.get_text() for one in figure.legends for text in one.get_texts()]


def heights(axes):
    return [bar.get_height() for bar in axes.patches]


def widths(axes):
    return [bar.get_width() for bar in axes.patches]


def lines(axes):
    return {line.get_label(): list(line.get_ydata()) for line in axes.lines}


def test_sweep():
    points = [
        {"percent": 99.9, "value": 0.7, "saturation": 0.09, "precision": 0.001},
        {"percent": 100.0, "value": 0.5, "saturation": 0.0, "precision": 0.02},
    ]
    figure = draw_sweep(points, "cosine", 0.9)
    bars, quality = figure.axes
    assert heights(bars) == pytest.approx([9, 0, 0.1, 2])
    assert bars.get_ylabel() == "error / variance (%)"
    assert lines(quality) == {"cosine": [0.7, 0.5], "float model": [0.9, 0.9]}
    assert [tick.get_text() for tick in bars.get_xticklabels()] == ["99.9", "100"]
    assert legend(figure) == ["saturation error", "precision error", "cosine", "float model"]


def test_blocks():
    losses = {"outside": (0.2, 0.1), "blocks.0": (0.9, 0.3)}
    figure = draw_blocks(losses, {"blocks.0": (50.0, 4.0)})
    bars, ranges = figure.axes
    assert heights(bars) == [0.2, 0.9, 0.1, 0.3]
    assert "nats" in bars.get_ylabel()
    drawn = lines(ranges)
    assert [drawn["range, full range"][1], drawn["range, saturated"][1]] == [50, 4]
    assert len(legend(figure)) == 4


def test_channels():
    def group(first, spread):
        quartiles = {"quartile_low": -spread, "median": 0.5, "quartile_high": spread}
        whiskers = {"whisker_low": -2 * spread, "whisker_high": 2 * spread}
        extremes = {"low": -3 * spread, "high": 9 * spread}
        return {"first": first, "last": first, **quartiles, **whiskers, **extremes}

    figure = draw_channels([group(0, 1.0), group(1, 10.0)], [group(0, 100.0)])
    axes, bar = figure.axes
    boxes = [line.get_ydata() for line in axes.lines]
    assert any(list(y) == [0.5, 0.5] for y in boxes)
    assert any(list(y) == [-30.0, 90.0] for y in boxes)
    assert axes.get_ylim() == pytest.approx((-450, 1350))
    assert bar.get_ylim() == pytest.approx((12, 1200))
    assert bar.get_ylabel() == "range of the group"
    draw_channels([{**group(0, 0.0), "low": 0.0, "high": 0.0}])  # a constant tensor


def test_calibrators():
    figure = draw_calibrators({"minmax": 0.5, "kl": 0.25}, "accuracy (%)", 0.75)
    (axes,) = figure.axes
    assert widths(axes) == [0.5, 0.25]
    assert axes.get_xlabel() == "accuracy (%)"
    assert legend(figure) == ["float model"]


def test_ranges():
    figure = draw_ranges({"base": {"a": 3.0, "b": 200.0}, "tuned": {"a": 2.0}}, "norms")
    (axes,) = figure.axes
    assert lines(axes)["base"] == [3, 200]
    assert lines(axes)["tuned"][0] == 2
    assert (axes.get_yscale(), axes.get_ylabel()) == ("log", "max |x|")
    assert legend(figure) == ["base", "tuned"]


def test_the_arms_of_a_demo_can_be_told_apart():
    (axes,) = draw_ranges({arm.name: {"a": 1.0} for arm in MiniLM.arms}, "norms").axes
    looks = {(to_hex(line.get_color()), line.get_linestyle()) for line in axes.lines}
    assert len(looks) == len(MiniLM.arms)


def test_sensitivity():
    sites = [
        {"site": "blocks.0.add0", "kind": "residual", "sensitivity": 0.5},
        {"site": "blocks.0.fc.input", "kind": "input", "sensitivity": 0.25},
    ]
    figure = draw_sensitivity(sites, NAMES)
    (axes,) = figure.axes
    assert widths(axes) == [50, 25]
    assert axes.get_xlabel() == "error of the output (%)"
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["0.add0", "0.fc.input"]
    assert legend(figure) == ["residual sums", "inputs of Linear"]


def test_every_kind_of_tensor_has_a_name():
    # tables of embeddings are weights
    assert NAMES.keys() == PRESETS["full"] - {"embedding"}


def test_short_names_keep_what_differs():
    assert short_site("encoder.layer.3.output.dense.input") == "3.output.dense.input"
    assert short_site("bert.encoder.layer.0.output.add0") == "0.output.add0"
    assert short_site("head.input") == "head.input"


def test_a_model_that_knows_nothing_is_drawn():
    (axes,) = draw_calibrators({"minmax": 0.0, "percentile": 0.0}, "accuracy", 0.0).axes
    assert axes.get_xlim() == (0, 1)
