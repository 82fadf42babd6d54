"""A page's sections for an analysis: what hurts and why, with Figs. 2 to 6 of the paper."""

from collections.abc import Sequence

from .outlier_sections import massive, outliers
from .page import Bold, Picture, Section, Table, facts_table
from .plots import (
    draw_blocks,
    draw_calibrators,
    draw_channels,
    draw_ranges,
    draw_sensitivity,
    draw_sweep,
)
from .words import NAMES, Data, number, percent

WORST = 20  # tensors that are shown


def analysis_sections(data: Data) -> list[Section]:
    """Return the sections for what analysis.json holds."""
    worst = sorted(data["sites"], key=lambda site: -site["sensitivity"])[:WORST]
    return [
        _summary(data, worst),
        _sensitivity(data, worst),
        outliers(worst),
        massive(data),
        _channels(data),
        _sweep(data),
        _blocks(data),
        _calibrators(data),
        _ranges(data),
        Section("Recipe", tables=[facts_table({**data["facts"], **data["scheme"]})]),
        Section(
            "Environment",
            tables=[facts_table({**data["environment"], "seconds": data["seconds"]})],
        ),
    ]


def _summary(data: Data, worst: Sequence[Data]) -> Section:
    metric, bits = data["metric"], data["scheme"]["bits"]
    rows = [
        (model["name"], number(model["float"]), number(model["minmax"])) for model in data["models"]
    ]
    columns = ("", f"{metric}, float", f"{metric}, W{bits}A{bits} min-max")
    return Section(
        f"{data['analysis']}: what hurts",
        points=_findings(data, worst),
        tables=[Table(columns, [(None, rows)])],
    )


def _findings(data: Data, worst: Sequence[Data]) -> list[str]:
    """Say in words what the numbers below show first of all."""
    errors, first = data["errors"], worst[0]
    kind = min(errors["without"], key=lambda name: errors["without"][name])
    found = [
        f"All tensors quantized, the model's output is off by {percent(errors['everything'])}: "
        f"{percent(errors['activations'])} by the activations alone, "
        f"{percent(errors['weights'])} by the weights alone.",
        f"The tensor that hurts most alone is {first['site']} ({percent(first['sensitivity'])}): "
        f"its largest magnitude is {first['absmax']:.4g}, its median magnitude "
        f"{first['median']:.2g}.",
        f"Leaving the {NAMES[kind]} in float helps most: the activations then cost "
        f"{percent(errors['without'][kind])}.",
    ]
    if where := first["outliers"]:
        found.insert(2, f"There, {_where(where)}.")
    best = next(point for point in data["sweep"] if point["percent"] == data["best"])
    found.append(
        f"The best saturation threshold leaves {data['best']:.7g} % of the values untouched "
        f"({data['metric']} {number(best['value'])}); precision loss is then "
        f"{percent(best['precision_share'])} of a tensor's error on average."
    )
    return found


def _where(outliers: Data) -> str:
    text = outliers["largest"][0]["text"]
    return (
        f"channel {outliers['channel']} holds the largest value of "
        f"{percent(outliers['channel_share'])} of the samples, and token {outliers['token']} that "
        f"of {percent(outliers['token_share'])}" + (f" (the largest of all: {text})" * bool(text))
    )


def _sensitivity(data: Data, worst: Sequence[Data]) -> Section:
    errors = data["errors"]
    rows = [(f"all but {NAMES[kind]}", value) for kind, value in errors["without"].items()]
    rows = [
        ("everything", errors["everything"]),
        ("weights alone", errors["weights"]),
        ("activations alone", errors["activations"]),
        *sorted(rows, key=lambda row: row[1]),
    ]
    sheet = Table(
        ("quantized", "error of the output"),
        [(None, [(name, percent(value)) for name, value in rows])],
    )
    caption = (
        f"One tensor quantized at a time to {data['scheme']['bits']} bits over its full range: "
        "‖quantized - float‖ / ‖float‖ of the model's output, the worst "
        f"{len(worst)} of {len(data['sites'])} tensors."
    )
    return Section(
        "Which tensors hurt",
        tables=[sheet],
        pictures=[Picture(draw_sensitivity(worst, NAMES), caption)],
    )


def _channels(data: Data) -> Section:
    drawings = []
    for site in data["models"][0]["channels"]:
        models = {model["name"]: model["channels"][site] for model in data["models"]}
        every = [group for groups in models.values() for group in groups]
        drawings += [
            Picture(draw_channels(groups, every), f"{name}: {site}.")
            for name, groups in models.items()
        ]
    return Section(
        "Spread of the channels (Fig. 2)",
        "Values of all rows and tokens, in groups of neighbouring channels. Boxes are quartiles, "
        "whiskers reach 1.5 interquartile ranges, dashes are the extremes.",
        pictures=drawings,
    )


def _sweep(data: Data) -> Section:
    figure = draw_sweep(data["sweep"], data["metric"], data["models"][0]["float"])
    caption = (
        "Each activation covers that part of its magnitudes. Bars: the two parts of the squared "
        "error, over the variance of the tensor, mean over all tensors. Line: the quantized model."
    )
    columns = (
        "left untouched", data["metric"], "saturation", "precision loss", "share of precision loss"
    )  # fmt: skip
    rows = [_sweep_row(point, point["percent"] == data["best"]) for point in data["sweep"]]
    return Section(
        "Saturation against precision (Fig. 3)",
        "Errors are shares of each tensor's variance, and means over the tensors; so is the share "
        "of precision loss in the error.",
        tables=[Table(columns, [(None, rows)])],
        pictures=[Picture(figure, caption)],
    )


def _sweep_row(point: Data, best: bool) -> Sequence[str]:
    value = number(point["value"])
    return (
        f"{point['percent']:.7g} %",
        Bold(value) if best else value,
        percent(point["saturation"]),
        percent(point["precision"]),
        percent(point["precision_share"]),
    )


def _blocks(data: Data) -> Section:
    full = max(range(len(data["sweep"])), key=lambda i: data["sweep"][i]["percent"])
    best = [point["percent"] for point in data["sweep"]].index(data["best"])
    blocks = dict.fromkeys(site["block"] for site in data["sites"])
    divergences = {
        block: [
            sum(site["divergence"][i] for site in data["sites"] if site["block"] == block)
            for i in (full, best)
        ]
        for block in blocks
    }
    ranges = {
        block: (_absmax(one["norm_input"]), one["norm_input"]["quantile"])
        for block, one in data["models"][0]["blocks"].items()
    }
    caption = (
        "Bars: sum over the tensors of a block of KL(float ‖ quantized), by histograms of 2,048 "
        f"bins. Lines: dynamic range. Saturated: at {data['best']:.7g} % of the values."
    )
    return Section(
        "Precision loss and range per block (Fig. 4)",
        pictures=[Picture(draw_blocks(divergences, ranges), caption)],
    )


def _calibrators(data: Data) -> Section:
    bits, values = data["scheme"]["bits"], data["calibrators"]
    figure = draw_calibrators(values, data["metric"], data["models"][0]["float"])
    return Section(
        "Calibrators (Fig. 5)",
        pictures=[Picture(figure, f"{data['metric']} at W{bits}A{bits}, weights per channel.")],
    )


def _ranges(data: Data) -> Section:
    curves = {
        model["name"]: {block: _absmax(one["norm_input"]) for block, one in model["blocks"].items()}
        for model in data["models"]
    }
    title = "Dynamic range per block (Fig. 6)"
    if not any(curves.values()):
        return Section(title, "The model has no repeated blocks with a norm and Linear modules.")
    caption = "Largest magnitude before the second norm of each block."
    if len(curves) == 1:
        caption += " `quanttune analyze --compare` draws another model beside it."
    picture = Picture(draw_ranges(curves, "before the second norm"), caption)
    return Section(title, pictures=[picture])


def _absmax(extent: Data) -> float:
    return float(max(-extent["low"], extent["high"]))
