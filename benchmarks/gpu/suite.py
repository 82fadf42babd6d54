"""Run the sections of the GPU suite, and print the table of bars. See gpu_suite.sh."""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.bars import GPU_BARS
from benchmarks.gpu import checks, kernels, methods, steps
from benchmarks.gpu.machine import Machine
from benchmarks.provenance import commit
from quanttune.environment import environment
from quanttune.files import write_json

SECTIONS = {
    "correctness": checks.correctness,
    "sanitizer": checks.sanitizer,
    "graph": checks.graph_capture,
    "ceilings": kernels.ceilings,
    "kernels": kernels.kernels,
    "steps": steps.steps,
    "methods": methods.methods,
}


def main() -> None:
    options = _options()
    machine = Machine(dry=options.dry_run)
    if not (machine.dry or torch.cuda.is_available()):
        sys.exit("no GPU is visible to torch. --dry-run tries the suite on the CPU")
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "gpu.json"
    result: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    result |= {"dry_run": machine.dry, "commit": commit(), "environment": environment()}
    for name in options.sections:
        print(name, file=sys.stderr, flush=True)
        start = time.perf_counter()
        result[name] = SECTIONS[name](machine)
        result[name]["seconds"] = time.perf_counter() - start
        write_json(file, result)
    result["ratios"] = ratios(result)
    write_json(file, result)
    _print(result)


def ratios(result: dict[str, Any]) -> dict[str, float]:
    """Return what the measured sections say to each bar, the worst of the sizes it is meant for."""
    found: dict[str, float] = {}
    sizes = [row for row in result.get("kernels", {}).get("rows", []) if row["dtype"] == "bfloat16"]
    large = [row for row in sizes if row["megabytes"] >= 100] or sizes
    ceilings = result.get("ceilings", {})
    if large and ceilings:
        read, copy = ceilings["read_gb_per_s"], ceilings["copy_gb_per_s"]
        found["forward_vs_read"] = min(row["forward_gb_per_s"] for row in large) / read
        found["backward_vs_copy"] = min(row["backward_gb_per_s"] for row in large) / copy
    if large:
        for key in ("step_vs_eager", "fake_quant_vs_torch"):
            found[key] = min(row[key] for row in large if key in row)  # plain PyTorch: not at all
    for row in result.get("steps", {}).get("rows", []):
        found[f"step {row['model']}"] = row["time_ratio"]
    return found


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="the folder that gets gpu.json")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--sections", type=lambda text: text.split(","), default=list(SECTIONS))
    options = parser.parse_args()
    for name in options.sections:
        if name not in SECTIONS:
            parser.error(f"no section {name!r}: choose from {', '.join(SECTIONS)}")
    return options


def _print(result: dict[str, Any]) -> None:
    where = "dry run: these figures mean nothing" if result["dry_run"] else "one GPU, bfloat16"
    table = Table(title=where)
    for column in ("what", "measured", "bar", "goal"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for key, value in result["ratios"].items():
        bar = GPU_BARS[key]
        missed = "" if result["dry_run"] or bar.met(value) else " missed"
        table.add_row(bar.what, f"{value:.3f}x{missed}", bar.text(), bar.text(goal=True))
    Console(width=None if sys.stdout.isatty() else 110).print(table)


if __name__ == "__main__":
    main()
