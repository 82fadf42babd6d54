"""Tables of what models are worth: refits, methods and their cost, SmolLM2, Whisper."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from statistics import mean
from typing import Any, NamedTuple

from benchmarks.accuracy import methods
from benchmarks.markdown_table import table
from quanttune.demo import recipe
from quanttune.demo.experiment import FLOAT_BITS
from quanttune.report.results_table import DIGITS, LESS_IS_BETTER, Cell, cells_of

# of ways.py, and what a column of them is called
METRICS = {
    "perplexity": "perplexity",
    "last_token_accuracy": "last token, %",
    "word error rate": "words wrong, %",
}
_ALL = "kept prefix; rotate, smooth_inputs, smoothquant"


class ShownModel(NamedTuple):
    """A row of the README's table: a model, what is rounded of it, and how."""

    model: str
    task: str
    metric: str
    coverage: str
    arm: str
    remedy: str


SHOWN_MODELS = (
    ShownModel("SmolLM2-135M", "smollm2", "perplexity", "linear", "base", _ALL),
    ShownModel("SmolLM2-135M", "smollm2", "perplexity", "everything", "base", _ALL),
    *(
        ShownModel("Whisper tiny.en", "whisper", "word error rate", coverage, "detached", "nothing")
        for coverage in ("linear inputs", "everything")
    ),
)
# what other libraries round is compared with these rows
BESIDE_RIVALS = {"smollm2": "linear", "whisper": "linear inputs"}


def refit_section(measured: Any) -> str:
    """Return the table of a run of refitting.py."""
    task, split = measured["task"], measured["split"]
    return f"""## Refit and finishing on {task}: {recipe(task).metric} on the {split} rows

{measured["environment"]["processor"]}. Means of the seeds, ± their standard deviation; what is
not trained has one. Weights per channel; coverage full_no_softmax and symmetric grids, unless said
otherwise.

{refit_table(measured)}
"""


def refit_table(measured: Any, ways: Collection[str] = ()) -> str:
    """Return a row per arm and way to quantize, or for some ways only."""
    digits, rows = DIGITS[recipe(measured["task"]).metric], measured["rows"]
    values: dict[Any, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        finish = ", ".join(map(str, row["finish_bits"]))
        finish = f"{row['finish_steps']} ({finish})" if finish else ""
        steps = str(row["steps"]) if row["learning_rate"] else ""
        arm = row["arm"], steps, _number(row["learning_rate"]), _number(row["refit"]), finish
        values[*arm, row["way"]][row["bits"]].append(row["value"])
    widths = sorted({row["bits"] for row in rows} - {FLOAT_BITS}, reverse=True)
    lines = []
    for (*arm, way), found in values.items():
        if way != "none" and (not ways or way in ways):
            exact = values[*arm, "none"][FLOAT_BITS]
            means = [_mean(seeds, digits) for seeds in (exact, *(found[bits] for bits in widths))]
            lines.append((*arm, way, str(max(map(len, found.values()))), *means))
    settings = "steps", "learning rate", "refit's tolerance", "rounded steps"
    names = (methods.width(bits, bits) for bits in widths)
    return table(("arm", *settings, "quantized by", "seeds", "fp32", *names), lines)


def _mean(values: list[float], digits: int) -> str:
    return cells_of([values])[0].text(digits) if values else ""


def _number(value: float | None) -> str:
    return f"{value:g}" if value else ""


def methods_section(name: str, measured: Any) -> str:
    """Return the tables of a run of methods.py, one per coverage."""
    digits, rows = DIGITS[measured["metric"]], measured["rows"]
    seeds = len({row["seed"] for row in rows})
    values: dict[Any, list[float]] = defaultdict(list)
    for row in rows:
        width = methods.width(row["weight_bits"], row["bits"])
        way = methods.way(row["calibrator"], row["methods"])
        values[row["coverage"], width, row["arm"], way].append(row["value"])
    exact = {arm: found for (coverage, _, arm, _), found in values.items() if coverage == "none"}
    cells = zip(exact, cells_of(list(exact.values())), strict=True)
    floats = [f"{arm} {cell.text(digits)}" for arm, cell in cells]
    parts = [
        f"## Methods on {name}: {measured['metric']} on the test rows",
        f"{_of_seeds(seeds)} Float: "
        f"{', '.join(floats)}. Weights per channel; methods with min-max and their default "
        "options; percentile and kl without a method. Bold: the best of a column.",
    ]
    for coverage in dict.fromkeys(row["coverage"] for row in rows if row["coverage"] != "none"):
        chosen = {tuple(key): found for (c, *key), found in values.items() if c == coverage}
        parts += [f"Coverage {coverage}:", _methods_table(chosen, digits)]
    return "\n\n".join(parts) + "\n"


def _of_seeds(seeds: int) -> str:
    """Tell what stands in a table of methods."""
    if seeds == 1:
        return "One seed."
    return f"Means of {seeds} seeds, ± their standard deviation; MiniLM's base has one."


def _methods_table(values: dict[Any, list[float]], digits: int) -> str:
    """Return a row per way and a column per width and arm; values: by width, arm and way."""
    names = [methods.width(*bits) for bits in methods.WIDTHS]
    arms = dict.fromkeys(arm for _, arm, _ in values)
    measured = {key[:2] for key in values}
    columns = [(width, arm) for width in names for arm in arms if (width, arm) in measured]
    of_rows = {key[2] for key in values}  # a method may be younger than the run
    ways = [way for choice in methods.CHOICES if (way := methods.way(*choice)) in of_rows]
    cells = [cells_of([values.get((*column, way), []) for way in ways]) for column in columns]
    rows = zip(ways, zip(*cells, strict=True), strict=True)
    lines = ((way, *(bold(cell, digits) for cell in row)) for way, row in rows)
    return table(("", *map(" ".join, columns)), lines)


def ways_section(title: str, measured: Any) -> str:
    """Return the table of a run of ways.py."""
    metrics = [name for name in METRICS if name in measured["rows"][0]]
    values: dict[Any, list[Any]] = defaultdict(list)
    for row in measured["rows"]:
        values[row["split"], row["arm"], row["way"]].append(row)
    rows = []
    for (split, arm, way), found in values.items():
        first, *others = ([row[name] for row in found if row[name] is not None] for name in metrics)
        share = mean(first) / mean(row[metrics[0]] for row in values[split, "base", "float"])
        cells = _text(first, 2), f"{share:.2f}x", *(_text(other, 1) for other in others)
        rows.append((f"{split}, {arm}: {way}", *cells))
    caveats = "".join(f"- {caveat}\n" for caveat in measured["caveats"])
    heads = [METRICS[name] for name in metrics]
    return f"""## {title}

Means of seeds, ± their standard deviation where there are several; a seed draws the rows of
calibration and tuning. Weights per channel, symmetric static grids and min-max if not said. "all
but sums" is coverage full_no_softmax with residual=False, "everything" the same with it. "of
float": of the base model on the same rows.

{caveats}
{table(("", heads[0], "of float", *heads[1:]), rows)}
"""


def _text(values: list[float], digits: int) -> str:
    """Return a mean and its deviation; "-" where nobody looked."""
    return cells_of([values])[0].text(digits) if values else "-"


def models_table(measured: Mapping[str, Any], rivals: Mapping[str, Any]) -> str:
    """Return a row per model and what is rounded, of runs of ways.py on test rows.

    measured, rivals: by task.
    """
    rows = []
    for shown in SHOWN_MODELS:
        values: dict[tuple[str, str], list[float]] = defaultdict(list)
        for row in measured[shown.task]["rows"]:
            if row["split"] == "test":
                values[row["arm"], row["way"]].append(row[shown.metric])
        way = f"W8A8 {shown.coverage}: "
        ours = values[shown.arm, way + shown.remedy]
        untuned = (values["base", x] for x in ("float", way + "nothing", way + "mse"))
        found = [row[shown.metric] for row in rivals[shown.task]["rows"] if shown.metric in row]
        is_beside = BESIDE_RIVALS[shown.task] == shown.coverage
        others = [f"{min(found):.2f}" if found and is_beside else ""]
        name = f"{shown.model}, {METRICS[shown.metric]}, {shown.coverage}"
        rows.append((name, *(_text(x, 2) for x in untuned), *others, _text(ours, 2)))
    return table(("W8A8", "float", "min-max", "mse", "best other library", "here"), rows)


def language_rivals_section(title: str, measured: Any) -> str:
    """Return the table of a run of rivals/generative.py."""
    metrics = [name for name in METRICS if any(name in row for row in measured["rows"])]
    rows = []
    for row in measured["rows"]:
        version = measured["libraries"].get(row["library"], "")
        name = f"{row['library']} {version}, {row['setting']}"
        name += f" ({row['activations']}{', zero points' if row['zero_points'] else ''})"
        first, *others = (
            _text([row[x]] if x in row else [], n) for x, n in zip(metrics, (2, 1), strict=False)
        )
        rows.append((name, row.get("reason", first), *others))
    return f"""## Other libraries on {title}

The test rows, base, W8A8, inputs of Linear modules alone. Ranges are those of one draw of the
calibration rows, the first; ModelOpt leaves the head in float.

{table(("", *(METRICS[name] for name in metrics)), rows)}
"""


def whisper_weights_section(measured: Any) -> str:
    """Return the table of a run of whisper_weights.py."""
    rows = []
    for window in measured["windows"]:
        share = window["largest_difference"] / window["largest_state"]
        equal = f"{window['equal_transcripts']} of {window['rows']}"
        rows.append((f"{window['seconds']} s", equal, str(window["tokens"]), f"{share:.1e}"))
    heads = "transcripts equal", "tokens", "encoder, largest difference of the largest value"
    return f"""## Whisper as it is read, beside CTranslate2

The packaged file (float16, widened to float32 by both) in transformers and in CTranslate2
{measured["ctranslate2"]}: validation rows, greedy, in Whisper's own window and in the demo's.

{table(("window", *heads), rows)}
"""


def times_section(measured: Any) -> str:
    """Return the table of a run of method_times.py."""
    found = {(row["model"], row["way"]): row for row in measured["rows"]}
    models = dict.fromkeys(model for model, _ in found)
    rows = []
    for way in dict.fromkeys(way for _, way in found):
        cells = [_time_cells(found.get((model, way))) for model in models]
        rows.append((way, *(cell for pair in cells for cell in pair)))
    facts = measured["environment"]
    where = f"{facts['processor']}, {facts['threads']} threads"
    heads = ("ViT-tiny, seconds", "error", "MiniLM, seconds", "error")
    taken = [row["seconds"] for row in measured["rows"] if row["model"] == "minilm"]
    whole = sum(seconds for seconds in taken if seconds is not None)
    return f"""## What methods cost

A ViT-tiny (12 layers, 192 wide, random weights), 32 images of 224 pixels, W4A4; MiniLM, 160 rows of
24 tokens, W6A6. Coverage linear, each on min-max, once, calibration included; {where}. Error:
squared difference of the answers on these rows, relative to the float model's. MiniLM's take
{whole:.0f} s together, a refit of it {measured["refit"]:.0f} s, `quanttune analyze minilm`
{measured["analyze"]:.0f} s. Left out: searches of scales, and adaround on MiniLM, minutes each.

{table(("", *heads), rows)}
"""


def _time_cells(row: Any) -> tuple[str, str]:
    if row is None:
        return "", ""
    if row["seconds"] is None:
        return "refused", ""
    return f"{row['seconds']:.1f}", f"{row['error']:.3f}"


def choices_table(measured: Iterable[Any]) -> str:
    """Return the table of runs of auto.py: what was chosen, and what is lost on which rows."""
    heads = ("model", "target", "seed", "chosen", "float, test", "test", "lost, validation",
             "lost, test", "tried", "seconds", "ended")  # fmt: skip
    rows = []
    for results in measured:
        digits = DIGITS[results["metric"]] + 1
        sign = -1 if results["metric"] in LESS_IS_BETTER else 1
        for row in sorted(results["rows"], key=lambda row: (row["target"], row["seed"])):
            lost = [sign * (row[f"float_{x}"] - row[x]) for x in ("validation", "test")]
            numbers = [row["float_test"], row["test"], *lost]
            tried = [str(len(row["tried"]))] if row["tried"] else [""]
            rows.append((
                results["task"], row["target"], str(row["seed"]), row["steps"][-1]["recipe"],
                *(f"{number:.{digits}f}" for number in numbers), *tried, f"{row['seconds']:.0f}",
                row["ended"],
            ))  # fmt: skip
    return table(heads, rows, numbers=0)


def bold(cell: Cell, digits: int) -> str:
    """Return what a cell shows, in bold if it is the best of its row or column."""
    text = cell.text(digits)
    return f"**{text}**" if cell.best else text
