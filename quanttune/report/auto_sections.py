"""A page's sections for a choice: what it is worth, what each step bought, all that was tried."""

from collections.abc import Mapping
from typing import Any

from .page import Picture, Row, Section, Table, Text, facts_table
from .plots import draw_steps, draw_trials
from .words import Data, number

MEGA = 1e6


def auto_sections(data: Data) -> list[Section]:
    """Return the sections for what auto.json holds."""
    return [
        _worth(data),
        *([_steps(data)] if data["steps"] else []),
        *([_tried(data)] if data["tried"] else []),
        Section("Recipe", tables=[facts_table(_flat_recipe(data["recipe"]))]),
        Section("Environment", tables=[facts_table({**data["environment"], "rows": data["rows"]})]),
    ]


def _worth(data: Data) -> Section:
    verdict, file = data["verdict"], data["file"]
    names = ("float", "quantized", "file")
    rows = [
        (part, *(number(of[name]) if name in of else "-" for name in names))
        for part, of in data["values"].items()
    ]
    file_size, float_size = (
        f"{size / MEGA:.1f} MB" for size in (file["bytes"] or 0, data["float_bytes"])
    )
    ends = f" The search ended since {data['ended']}." * bool(data["ended"])
    return Section(
        f"{data['auto']} for {data['target']}: {data['metric']}",
        f"{'Met' if verdict['met'] else 'Not met'}: a drop of {data['drop']}.{ends}",
        [
            *verdict["words"],
            f"The file has {file_size}; the float model's parameters take {float_size}.",
            *file["problems"],
        ],
        [Table((f"{data['metric']} of the rows of", *names), [(None, rows)])],
    )


def _steps(data: Data) -> Section:
    sign = -1 if data["less_is_better"] else 1
    rows: list[Row] = []
    before: float | None = None
    for step in data["steps"]:
        bought = "" if before is None else f"{sign * (step['value'] - before):+.3g}"
        seconds = f"{step['seconds']:.0f}"
        rows.append((Text(step["recipe"]), number(step["value"]), bought, seconds))
        before = step["value"]
    columns = ("recipe", data["metric"], "better by", "seconds")
    figure = draw_steps(data["steps"], data["metric"], data["values"]["validation"]["float"])
    return Section(
        "What each step bought",
        "On the validation rows. Each was the best when it was measured.",
        tables=[Table(columns, [(None, rows)])],
        pictures=[Picture(figure, f"{data['metric']} of the validation rows.")],
    )


def _tried(data: Data) -> Section:
    most = max(trial["parts"] for trial in data["tried"])
    columns = ("recipe", data["metric"], "rows", "seconds")
    rows = [
        (
            Text(trial["recipe"] + (f" (refused: {trial['refused']})" * bool(trial["refused"]))),
            "-" if trial["value"] is None else number(trial["value"]),
            f"{trial['parts']}/{most}",
            f"{trial['seconds']:.0f}",
        )
        for trial in data["tried"]
    ]
    figure = draw_trials(data["tried"], data["metric"], data["values"]["validation"]["float"])
    caption = (
        "Each candidate when it was done. Hollow: left after a part of the rows, clearly behind "
        "the best."
    )
    return Section(
        "All that was tried",
        tables=[Table(columns, [(None, rows)])],
        pictures=[Picture(figure, caption)],
    )


def _flat_recipe(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is done, without what is left out."""
    done = {"refit": recipe["refit"], "prefix": recipe["prefix"], **recipe["quantization"]}
    done["overrides"] = list(done.get("overrides") or ())
    return {name: value for name, value in done.items() if value not in (None, [], ())}
