"""Make docs/reliability.md from the committed results of attack.py and mutants.py.

python -m benchmarks.reliability.page
"""

import json
from pathlib import Path

from benchmarks.markdown_table import table

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "epyc-2-cores"
PAGE = ROOT / "docs" / "reliability.md"
MARK = "<!-- made by benchmarks/reliability/page.py -->"
WHAT = {
    "fake_quant": "fake_quant: any type, shape, layout, width, axis and zero point",
    "fake_quant_backward": "its gradient",
    "dynamic_fake_quant": "dynamic_fake_quant",
    "outlier_statistics": "the outlier statistics, against the reference and float64",
    "outlier_statistics_backward": "their gradient, against float64",
    "quantization_errors": "the search of ranges, against float64",
    "magnitude_histogram": "histograms",
    "load": "a damaged file of a model is refused, and the model stays; or is what was loaded",
    "interrupted_quantize": "Ctrl-C in quantize: the model is as before, and can be quantized",
    "interrupted_forward": "Ctrl-C in a quantized forward: the next one has the same bits",
    "interrupted_tuning": "Ctrl-C in a forward or backward of tuning: the next step is right",
    "interrupted_save": "Ctrl-C in save: the older file or the newer one, and nothing beside it",
    "interrupted_load": "Ctrl-C in load: the model is as before, or loaded",
    "interrupted_export": "Ctrl-C in export_onnx: no file or a whole one, the model as before",
    "killed_save": "a process killed while it saves: the file is whole",
    "killed_tune": "tune, killed twice: ends with the bits of a run that was not",
    "threads": "threads that call one model, and write one file",
    "two_writers": "processes that write one folder: one does, the others are refused",
}


def main():
    attacks = json.loads((RESULTS / "attack.json").read_text())
    mutants = json.loads((RESULTS / "mutants.json").read_text())
    head = PAGE.read_text().split(MARK)[0]
    PAGE.write_text("\n\n".join([f"{head}{MARK}", _attacks(attacks), _mutants(mutants)]) + "\n")


def _attacks(found):
    rows = [
        (WHAT[name], f"{one['cases']:,}", str(one["seeds"]), str(len(one["failures"])))
        for name, one in found["attacks"].items()
    ]
    last = found["runs"][-1]
    versions = ", ".join(f"{name} {version}" for name, version in last["versions"].items())
    commits = ", ".join(dict.fromkeys(run["commit"][:8] for run in found["runs"]))
    where = f"{last['cores']} cores of an EPYC, {versions}; commit {commits}; seeds from 0 on"
    heads = ("what was tried", "cases", "seeds", "failed")
    return f"## Attacks\n\n{where}.\n\n{table(heads, rows)}"


def _mutants(found):
    counts = {}
    for name, one in found["mutants"].items():
        room = "C++" if name.startswith("C++") else one["file"].split("/")[-2]
        seen, made = counts.get(room, (0, 0))
        counts[room] = seen + (one["outcome"] == "killed"), made + 1
    rows = [(room, str(made), str(seen)) for room, (seen, made) in sorted(counts.items())]
    made, seen = (sum(int(row[i]) for row in rows) for i in (1, 2))
    heads = ("where", "faults made", "seen by tests")
    rows.append(("all", str(made), str(seen)))
    return f"## Faults that were made on purpose\n\n{table(heads, rows)}"


if __name__ == "__main__":
    main()
