"""Attach quanttune to every kind of model of timm and transformers, and compare its gradients.

python -m benchmarks.support.matrix [--only PATTERN] [--fresh]

Goes on where it was stopped: what the results file has is not run again, unless --fresh. It takes
about an hour on one core, and ends with docs/support.md, the page of the results.
"""

import argparse
import importlib
import json
import logging
import multiprocessing
import resource
import signal
import warnings
from fnmatch import fnmatch
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from benchmarks.provenance import commit
from benchmarks.support.names import names
from benchmarks.support.page import Row, page
from quanttune.environment import environment

ROOT = Path(__file__).resolve().parents[2]
JSON = ROOT / "benchmarks" / "results" / "support" / "support.json"
MARKDOWN = ROOT / "docs" / "support.md"
SECONDS = 20  # of processor time for a model
PATIENCE = 600  # seconds until a worker is taken for hung
BYTES = 6 << 30  # of memory that a worker may write to


class Worker:
    """A process that examines one model after another, and is made anew when it hangs or dies."""

    def __init__(self, module: str = "benchmarks.support.check") -> None:
        self._module = module
        self._process: multiprocessing.process.BaseProcess | None = None

    def examine(self, library: str, name: str) -> Row:
        """Return the outcome of a model."""
        if self._process is None:
            self._start()
        self._pipe.send((library, name))
        try:
            if self._pipe.poll(PATIENCE):
                row: Row = self._pipe.recv()
                return row
            message = f"hangs for {PATIENCE} s"
        except EOFError:
            message = "the process dies"
        self.stop()
        return {"outcome": "left out", "message": message}

    def stop(self) -> None:
        """End the process."""
        if self._process:
            self._process.kill()
            self._process.join()
        self._process = None

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, end = context.Pipe()
        self._process = context.Process(target=_serve, args=(end, self._module), daemon=True)
        self._process.start()
        end.close()


def _serve(pipe: Connection, module: str) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (BYTES, BYTES))
    signal.signal(signal.SIGPROF, _too_long)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    # they import timm and transformers, which the parent does without
    examine = importlib.import_module(module).examine

    logging.disable(logging.ERROR)
    while True:
        library, name = pipe.recv()
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            row = examine(library, name)
        except TimeoutError:
            row = {"outcome": "left out", "message": f"takes more than {SECONDS} s"}
        except MemoryError:
            row = {"outcome": "left out", "message": f"takes more than {BYTES >> 30} GiB"}
        signal.setitimer(signal.ITIMER_PROF, 0)
        pipe.send(row)


def _too_long(*_: object) -> None:
    raise TimeoutError


def main() -> None:
    options = _options()
    situations = options.json.with_name("situations.json")
    file = situations if options.situations else options.json
    result = json.loads(file.read_text()) if file.exists() else {"rows": {}}
    module = "benchmarks.support.situations" if options.situations else "benchmarks.support.check"
    run(result, options.only, options.fresh, file, module)
    if options.json.exists():
        other = json.loads(situations.read_text()) if situations.exists() else None
        options.markdown.write_text(page(json.loads(options.json.read_text()), other))


def run(
    result: dict[str, Any],
    only: str,
    fresh: bool,
    file: Path,
    module: str = "benchmarks.support.check",
) -> None:
    """Examine what matches and has no row yet, and write the file after each model."""
    todo = [
        (library, family, name)
        for library, family, name in names()
        if fnmatch(f"{library}/{family}/{name}", only)
        and (fresh or f"{library}/{name}" not in result["rows"])
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    worker = Worker(module)
    for library, family, name in track(todo, "models"):
        row = {"family": family, **worker.examine(library, name)}
        result["rows"][f"{library}/{name}"] = row
        result |= {"commit": commit(), "environment": environment()}
        result["missing"] = len({f"{key[0]}/{key[2]}" for key in names()} - result["rows"].keys())
        save(result, file)
    worker.stop()


def save(result: dict[str, Any], file: Path) -> None:
    """Write a result, a line per model."""
    rows = [f"{json.dumps(key)}: {json.dumps(row)}" for key, row in result["rows"].items()]
    head = json.dumps({key: value for key, value in result.items() if key != "rows"})
    text = f'{head[:-1]}, "rows": {{\n' + ",\n".join(rows) + "\n}}\n"
    part = file.with_suffix(".part")
    part.write_text(text.replace("{, ", "{", 1))
    part.replace(file)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="*", help="pattern of library/family/model")
    parser.add_argument(
        "--situations", action="store_true", help="quantize instead, and change the batch"
    )
    parser.add_argument("--fresh", action="store_true", help="run again what has a row")
    parser.add_argument("--json", type=Path, default=JSON)
    parser.add_argument("--markdown", type=Path, default=MARKDOWN)
    return parser.parse_args()


if __name__ == "__main__":
    main()
