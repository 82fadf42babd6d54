"""Make docs/results.md, and the README's tables, from the committed results files.

python -m benchmarks.summarize [benchmarks/results/h200/gpu.json]

With the result of gpu/suite.sh it makes the README's GPU table as well.
"""

import argparse
import json
from collections.abc import Collection
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.accuracy.storage_tables import caches_section, mixed_widths_section, weights_section
from benchmarks.accuracy.tables import (
    bold,
    choices_table,
    language_rivals_section,
    methods_section,
    models_table,
    refit_section,
    refit_table,
    times_section,
    ways_section,
    whisper_weights_section,
)
from benchmarks.bars import BARS, GPU_BARS, ONNX_BARS, ONNX_ROWS, Bar
from benchmarks.deploy.onnx_latency import COVERAGES, figures
from benchmarks.deploy.runtime_tables import edge_table, linear_table, runtimes_table
from benchmarks.gpu.tables import cpu_instructions_table, instructions_table
from benchmarks.growth.page import draw_growth, growth_tables
from benchmarks.kernels.finishing_step import finishing_table
from benchmarks.markdown_table import table
from benchmarks.rivals.accuracy_control import control_table
from benchmarks.rivals.tables import rival_sections
from benchmarks.support.memory_tables import needs_table, peaks_table
from quanttune.demo.experiment import Row
from quanttune.report.results_table import DIGITS, tabulate

SHOWN = ("none", "minmax", "percentile", "omse", "kl")  # in the README
ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "xeon-2-cores"
REFIT = RESULTS.with_name("epyc-2-cores")
REFIT_SHOWN = ("percentile", "omse, repq, erq")  # in the README
REFITTED = "<!-- refit: made by benchmarks/summarize.py -->"
END_OF_REFITTED = "<!-- end of refit -->"
MARK = "<!-- table: made by benchmarks/summarize.py -->"
END = "<!-- end of table -->"
AUTO = ("minilm", "digits", "smollm2")
COSINES = {
    "simulation": "simulated",
    "noise": "simulated with a little noise on what is rounded",
    "onnxruntime": "in ONNX Runtime",
}
GPU, END_OF_GPU = "<!-- gpu: made by benchmarks/summarize.py -->", "<!-- end of gpu -->"
MODELS, END_OF_MODELS = "<!-- models: made by benchmarks/summarize.py -->", "<!-- end of models -->"
SPEED, END_OF_SPEED = "<!-- speed: made by benchmarks/summarize.py -->", "<!-- end of speed -->"
NEEDS, END_OF_NEEDS = "<!-- needs: made by benchmarks/summarize.py -->", "<!-- end of needs -->"
PEAKS, END_OF_PEAKS = "<!-- peaks: made by benchmarks/summarize.py -->", "<!-- end of peaks -->"
EDGE = ("executorch", "litert")
RUNTIMES = "<!-- runtimes: made by benchmarks/summarize.py -->"
END_OF_RUNTIMES = "<!-- end of runtimes -->"
LINEAR, END_OF_LINEAR = "<!-- linear: made by benchmarks/summarize.py -->", "<!-- end of linear -->"
CONTROL = "<!-- control: made by benchmarks/summarize.py -->"
END_OF_CONTROL = "<!-- end of control -->"
CHOICES, END_OF_CHOICES = "<!-- auto: made by benchmarks/summarize.py -->", "<!-- end of auto -->"
GROWTH, END_OF_GROWTH = "<!-- growth: made by benchmarks/summarize.py -->", "<!-- end of growth -->"
FINISHING = "<!-- finishing: made by benchmarks/summarize.py -->"
END_OF_FINISHING = "<!-- end of finishing -->"
COUNTS = "<!-- instructions: made by benchmarks/summarize.py -->"
END_OF_COUNTS = "<!-- end of instructions -->"
CPU_COUNTS = "<!-- cpu instructions: made by benchmarks/summarize.py -->"
END_OF_CPU_COUNTS = "<!-- end of cpu instructions -->"
ONNX, END_OF_ONNX = "<!-- onnx: made by benchmarks/summarize.py -->", "<!-- end of onnx -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("gpu", type=Path, nargs="?", help="gpu.json of gpu/suite.sh")
    gpu = parser.parse_args().gpu
    demos = {name: _read(f"{name}.json") for name in ("minilm", "digits")}
    settings = {name: _read(f"settings-{name}.json") for name in demos}
    readme = ROOT / "README.md"
    _replace(readme, MARK, END, _results_table(demos["minilm"], SHOWN))
    if (RESULTS / "cpu-ratios.json").exists():
        _replace(readme, SPEED, END_OF_SPEED, _speed_table(_read("cpu-ratios.json")))
    if (RESULTS / "onnx.json").exists():
        _replace(readme, ONNX, END_OF_ONNX, onnx_table(_read("onnx.json")))
    if (REFIT / "refit-minilm.json").exists():
        shown = refit_table(_read("refit-minilm.json", REFIT), REFIT_SHOWN)
        _replace(readme, REFITTED, END_OF_REFITTED, shown)
    titles = {"smollm2": "SmolLM2", "whisper": "Whisper"}
    models = {task: _read(f"{task}.json") for task in titles}
    rivals = {task: _read(f"rivals-{task}.json") for task in titles}
    _replace(readme, MODELS, END_OF_MODELS, models_table(models, rivals))
    if gpu:
        _replace(readme, GPU, END_OF_GPU, gpu_table(json.loads(gpu.read_text())))
    _replace_in_docs()
    page = ROOT / "docs" / "results.md"
    head = page.read_text().split(MARK)[0]
    sections = [f"{head}{MARK}\n", *rival_sections(REFIT, RESULTS)]
    for name, demo in demos.items():
        sections += [_demo_section(name, demo), _settings_section(settings[name])]
        sections += [_demo_section(f"Zero points on {name}", _read(f"zero-points-{name}.json"))]
    for name in demos:
        title = f"Losses on {name}"
        sections += [_demo_section(title, _read(f"losses-{name}.json"))]
        sections += [_settings_section(_read(f"settings-losses-{name}.json"))]
    for name in demos:
        for file in ("refit", "settings-refit"):
            if (REFIT / f"{file}-{name}.json").exists():
                sections.append(refit_section(_read(f"{file}-{name}.json", REFIT)))
    for task, title in titles.items():
        sections.append(ways_section(title, models[task]))
        sections.append(language_rivals_section(title, rivals[task]))
    sections.append(ways_section("SmolLM2, on another machine", _read("smollm2.json", REFIT)))
    sections.append(weights_section(_read("weights-smollm2.json")))
    sections.append(caches_section(_read("caches.json")))
    sections.append(whisper_weights_section(_read("whisper-weights.json")))
    sections += [methods_section(name, _read(f"methods-{name}.json")) for name in demos]
    for name in demos:
        others = _read(f"some-methods-{name}.json")
        sections.append(methods_section(f"{name}, others", others))
    for name in demos:
        sections.append(mixed_widths_section(name, _read(f"mixed-widths-{name}.json")))
    sections.append(times_section(_read("method-times.json")))
    sections.append(_agreement_section(_read("onnx-agreement.json")))
    page.write_text("\n".join(sections))


def _replace_in_docs() -> None:
    """Make the tables of the pages that have a few each."""
    choices = [
        _read(f"auto-{task}.json") for task in AUTO if (RESULTS / f"auto-{task}.json").exists()
    ]
    auto = ROOT / "docs" / "auto.md"
    _replace(auto, CHOICES, END_OF_CHOICES, choices_table(choices))
    if (RESULTS / "accuracy-control.json").exists():
        _replace(auto, CONTROL, END_OF_CONTROL, control_table(_read("accuracy-control.json")))
    large = ROOT / "docs" / "large_models.md"
    _replace(large, NEEDS, END_OF_NEEDS, needs_table())
    _replace(large, PEAKS, END_OF_PEAKS, peaks_table(_read("memory.json")))
    deployment = ROOT / "docs" / "deployment.md"
    runtimes, edge = _read("runtimes.json"), _read("edge.json")
    _replace(deployment, RUNTIMES, END_OF_RUNTIMES, runtimes_table(runtimes))
    _replace(deployment, LINEAR, END_OF_LINEAR, linear_table(runtimes))
    for target in EDGE:
        mark, end = (
            f"<!-- {target}: made by benchmarks/summarize.py -->",
            f"<!-- end of {target} -->",
        )
        _replace(deployment, mark, end, edge_table(edge, target))
    _replace(ROOT / "docs" / "training.md", FINISHING, END_OF_FINISHING, finishing_table(_read))
    _replace_counts(ROOT / "docs" / "kernels.md")
    growth = _read("growth.json")
    _replace(ROOT / "docs" / "growth.md", GROWTH, END_OF_GROWTH, growth_tables(growth))
    draw_growth(growth, ROOT / "docs" / "growth")


def _read(name: str, folder: Path = RESULTS) -> Any:
    return json.loads((folder / name).read_text())


def _replace_counts(page: Path) -> None:
    names = ("instructions-before.json", "instructions.json")
    before, now = (_read(name, RESULTS.with_name("sm_90")) for name in names)
    _replace(page, COUNTS, END_OF_COUNTS, instructions_table(before, now))
    counted = _read("instructions.json", RESULTS.with_name("valgrind"))
    _replace(page, CPU_COUNTS, END_OF_CPU_COUNTS, cpu_instructions_table(counted))


def _replace(page: Path, mark: str, end: str, table: str) -> None:
    """Put a table between two marks of a page."""
    head, rest = page.read_text().split(mark)
    page.write_text(f"{head}{mark}\n\n{table}\n\n{end}{rest.split(end)[1]}")


def _speed_table(measured: Any) -> str:
    dtypes = ("float32", "bfloat16")
    rows = []
    for key, ratios in measured["ratios"].items():
        cells = [_ratio(BARS[key], ratios.get(dtype), dtype) for dtype in dtypes]
        rows.append((BARS[key].what, *cells, BARS[key].text()))
    return table(("", *dtypes, "bar"), rows)


def _ratio(bar: Bar, ratio: float | None, dtype: str) -> str:
    if ratio is None:
        return ""
    return f"{ratio:.2f}x" if bar.met(ratio, dtype) else f"{ratio:.2f}x, missed"


def onnx_table(measured: Any) -> str:
    """Return the table of a run of onnx_latency.py."""
    rows = []
    for key, values in figures(measured).items():
        cells = [f"{values[name]:.2f}x" if name in values else "" for name in COVERAGES]
        bar = ONNX_BARS[key].text() if key in ONNX_BARS else ""
        rows.append((ONNX_ROWS[key], *cells, bar))
    if tuned := measured["minilm"]:
        for what in ("simulation", "noise", "onnxruntime"):
            cosines = (tuned["cosine"].get(name) for name in COVERAGES)
            cells = [f"{cosine[what]:.4f}" if cosine else "" for cosine in cosines]
            rows.append((f"its cosine, {COSINES[what]}", *cells, ""))
    return table(("W8A8", *COVERAGES, "bar"), rows)


def gpu_table(measured: Any) -> str:
    """Return the table of a run of gpu_suite.sh; a dry run has none."""
    if measured["dry_run"]:
        raise ValueError("this is the result of a dry run, whose figures mean nothing")
    facts, versions = measured["environment"], measured["environment"]["versions"]
    where = f"{facts['gpu']}, torch {versions['torch']}, triton {versions['triton']}"
    ratios = ((GPU_BARS[key], f"{value:.2f}x") for key, value in measured["ratios"].items())
    return table((where, "measured", "bar"), [(bar.what, x, bar.text()) for bar, x in ratios])


def _results_table(demo: Any, calibrators: Collection[str] = ()) -> str:
    """Return all rows; or weights per channel, with these calibrators."""
    digits = DIGITS[demo["metric"]]
    found = tabulate(Row(**row) for row in demo["rows"])
    rows = []
    for group, ways in groupby(found.cells, lambda way: way.group):
        for way in ways:
            if calibrators and (way.weights != "channel" or way.calibrator not in calibrators):
                continue
            label = way.label if way.calibrator == "none" else f"{way.label}, {group}"
            rows.append((label, *(bold(cell, digits) for cell in found.cells[way])))
    return table(("", *found.arms), rows)


def _demo_section(name: str, demo: Any) -> str:
    seeds = len({row["seed"] for row in demo["rows"]})
    facts = demo["environment"]
    versions = ", ".join(f"{key} {value}" for key, value in facts["versions"].items() if value)
    caveats = "\n".join(f"- {caveat}" for caveat in demo["caveats"])
    arms = "\n".join(f"- {arm['name']}: {arm['summary']}" for arm in demo["recipe"]["arms"])
    machine = f"{facts['processor']}, {facts['threads']} threads"
    return f"""## {name}: {demo["metric"]} on the test rows

Mean ± standard deviation of {seeds} seeds; {demo["seconds"]:.0f} s on {machine}; {versions}.

{_results_table(demo)}

{arms}

{caveats}
"""


def _settings_section(settings: Any) -> str:
    columns = [key for key in settings["rows"][0] if key not in ("arm", "steps", "learning_rate")]
    rows = []
    for row in settings["rows"]:
        values = [f"{row[column]:.3f}" for column in columns]
        rows.append((row["arm"], str(row["steps"]), f"{row['learning_rate']:g}", *values))
    return f"""### Choice of its settings

Validation rows, seed {settings["seed"]}, min-max, weights per channel.

{table(("arm", "steps", "learning rate", *columns), rows)}
"""


def _agreement_section(measured: Any) -> str:
    heads = "integer products", "float", "sites, equal", "most codes that differ", "by more than 1"
    rows = []
    for row in measured["rows"]:
        cells = (
            str(row["integer_products"]),
            str(len(row["float_products"])),
            f"{row['layers']}, {row['layers_equal']}",
            f"{row['most_differing']['share']:.4%}",
            f"{row['most_beyond_one']:.4%}",
        )
        failed = " (fails)" if row["problems"] else ""
        rows.append((f"{row['model']}, {row['bits']} bits{failed}", *cells))
    return f"""## Exported files beside the simulation

Coverage full, in ONNX Runtime; each site was given the codes of the simulation before it, so what
differs is its own. Both largest shares are those of the worst site. timm's models have random
weights. The float products are patch embeddings, which ONNX Runtime convolves in integers at 8 bits
only.

{table(("", *heads), rows)}
"""


if __name__ == "__main__":
    main()
