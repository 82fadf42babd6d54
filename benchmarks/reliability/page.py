"""Make docs/reliability.md from the committed results of attack.py and mutants.py.

python -m benchmarks.reliability.page
"""

import json
import tomllib
from pathlib import Path

from benchmarks.markdown_table import table
from benchmarks.reliability.mutants import digest

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "reliability.md"
MARK = "<!-- made by benchmarks/reliability/page.py -->"
ATTACKED = ("xeon-2-cores", "2 cores of a Xeon")
MUTATED = ("epyc-2-cores", "xeon-2-cores")  # a fault that both saw is counted where it was last
STATE = "the model is as before, or whole"
WHAT = {
    "fake_quant": "fake_quant: any type, shape, layout, width, axis and zero point",
    "fake_quant_backward": "its gradient",
    "learned_fake_quant_backward": "that of a scale, against float64",
    "dynamic_fake_quant": "dynamic_fake_quant",
    "dynamic_fake_quant_backward": "its gradient, against float64",
    "outlier_statistics": "the outlier statistics, against the reference and float64",
    "outlier_statistics_backward": "their gradient, against float64",
    "quantization_errors": "the search of ranges, against float64",
    "magnitude_histogram": "histograms",
    "description": "a damaged description is refused, or is what the model then says it is",
    "load": "a damaged file of a model is refused, and the model stays; or is what was loaded",
    "run_folder": "a run with a damaged file is refused, or goes on from what is whole",
    "made_model": "a made model is tuned as by plain PyTorch; quantized, saved, loaded: the same",
    "made_export": "the ONNX file of a made model is what was simulated",
    "soak": "steps in a row: the same bits each time, no memory that grows",
    "interrupted_quantize": "Ctrl-C in quantize: the model is as before, and can be quantized",
    "interrupted_forward": "Ctrl-C in a quantized forward: the next one has the same bits",
    "interrupted_tuning": "Ctrl-C in a forward or backward of tuning: the next step is right",
    "interrupted_save": "Ctrl-C in save: the older file or the newer one, and nothing beside it",
    "interrupted_load": "Ctrl-C in load: the model is as before, or loaded",
    "interrupted_export": "Ctrl-C in export_onnx: no file or a whole one, the model as before",
    "interrupted_learn_scales": f"Ctrl-C in learn_scales: {STATE}",
    "interrupted_freeze_scales": f"Ctrl-C in freeze_scales: {STATE}",
    "interrupted_summary": f"Ctrl-C in summary: {STATE}",
    "interrupted_refit": f"Ctrl-C in refit: {STATE}",
    "interrupted_rotate": f"Ctrl-C in rotate: {STATE}",
    "interrupted_prefix": f"Ctrl-C in prefix: {STATE}",
    "interrupted_export_torch": f"Ctrl-C in export_torch: {STATE}",
    "interrupted_export_compressed_tensors": f"Ctrl-C in export_compressed_tensors: {STATE}",
    "interrupted_export_torchao": f"Ctrl-C in export_torchao: {STATE}",
    "interrupted_allocate_bits": "Ctrl-C in allocate_bits: the model is as before",
    "interrupted_attach": f"Ctrl-C in attach: {STATE}",
    "interrupted_auto": "Ctrl-C in auto: the model is as before",
    "interrupted_clip_softmax": f"Ctrl-C in clip_softmax: {STATE}",
    "interrupted_gate_attention": f"Ctrl-C in gate_attention: {STATE}",
    "interrupted_rectify_attention": f"Ctrl-C in rectify_attention: {STATE}",
    "interrupted_distill": "Ctrl-C in distill: student and teacher are as before, or whole",
    "interrupted_synthesize_images": "Ctrl-C in synthesize_images: the model is as before",
    "interrupted_requantize": f"Ctrl-C in requantize: {STATE}",
    "interrupted_learn_outliers": f"Ctrl-C in learn_outliers: {STATE}",
    "interrupted_verify": f"Ctrl-C in verify: {STATE}",
    "moments": "Ctrl-C at a moment in time, of quantize, forwards, steps or export_onnx",
    "interrupted_tune": "tune, interrupted twice: ends with the bits of a run that was not",
    "killed_save": "a process killed while it saves: the file is whole",
    "killed_tune": "tune, killed twice: ends with the bits of a run that was not",
    "killed_command": "calibrate, export or analyze, killed: what is there is whole, or made again",
    "threads": "threads that call one model, and write one file",
    "forks": "forked processes compute what their parent does, whatever it did before",
    "two_writers": "processes that write one folder: one does, the others are refused",
}


def main():
    attacks = json.loads((RESULTS / ATTACKED[0] / "attack.json").read_text())
    mutants = {}
    for machine in MUTATED:
        mutants |= json.loads((RESULTS / machine / "mutants.json").read_text())["mutants"]
    listed = tomllib.loads((ROOT / "tests" / "mutants.toml").read_text())["mutant"]
    keys = [f"{one['name']} [{digest(one)}]" for one in listed]
    mutants = {key: mutants[key] for key in keys if key in mutants}
    head = PAGE.read_text().split(MARK)[0]
    PAGE.write_text("\n\n".join([f"{head}{MARK}", _attacks(attacks), _mutants(mutants)]) + "\n")


def failed(one):
    mended = f", {len(one['mended'])} before it was mended" if one.get("mended") else ""
    return f"{len(one['failures'])}{mended}"


def _attacks(found):
    rows = [
        (WHAT[name], f"{one['cases']:,}", str(one["seeds"]), failed(one))
        for name, one in sorted(found["attacks"].items(), key=lambda item: [*WHAT].index(item[0]))
    ]
    last = found["runs"][-1]
    versions = ", ".join(f"{name} {version}" for name, version in last["versions"].items())
    commits = ", ".join(dict.fromkeys(run["commit"][:8] for run in found["runs"]))
    where = f"{ATTACKED[1]}, {versions}; commits {commits}; seeds from 0 on"
    heads = ("what was tried", "cases", "seeds", "failed")
    return f"## Attacks\n\n{where}.\n\n{table(heads, rows)}"


def _mutants(found):
    counts = {}
    for name, one in found.items():
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
