"""Quantize MiniLM by other libraries, each as its documentation says, on the rows of the demo.

make peers      # in environments of their own; python -m benchmarks.rivals --rows FILE --out DIR

The metric is the cosine to the float model's embeddings. A run that was interrupted goes on where
it stopped. `--write-rows` makes the file of rows, in the environment of the demo.
"""

import argparse
import json
import re
import time
import traceback
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.provenance import commit
from benchmarks.rivals import of_onnx, of_torch
from benchmarks.rivals.rows import SPLITS, Rows, write
from benchmarks.rivals.ways import Way
from quanttune.demo.minilm import load_encoder, packaged_model
from quanttune.environment import environment
from quanttune.files import write_json

LIBRARIES = (
    "torch", "torchao", "onnx", "onnxruntime", "openvino", "nncf", "brevitas", "aimet-onnx",
    "nvidia-modelopt", "optimum-quanto", "transformers",
)  # fmt: skip
# what libraries raise where they do not fit a model, or the versions of each other
FAILURES = (
    ImportError, RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError,
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build"), help="folder of the results")
    parser.add_argument("--rows", type=Path, required=True, help="file of the rows")
    parser.add_argument("--write-rows", action="store_true", help="write that file, and end")
    parser.add_argument("--only", default="", help="regular expression: library, setting and bits")
    options = parser.parse_args()
    if options.write_rows:
        write(options.rows)
        return
    path, rows = options.out / "rivals-minilm.json", Rows(options.rows)
    earlier = json.loads(path.read_text()) if path.exists() else {"rows": []}
    if earlier.get("fingerprint", rows.fingerprint()) != rows.fingerprint():
        parser.error(f"{path} is of other rows than {options.rows}: choose another --out")
    known = earlier["rows"]
    facts = {"commit": commit(), "environment": environment(), "libraries": libraries()}
    facts["fingerprint"] = rows.fingerprint()  # of the rows
    results = {"task": "minilm", "metric": "cosine", **facts, "rows": known}
    ways = [*of_torch.ways(), *of_onnx.ways()]
    wanted = [way for way in ways if re.search(options.only, way.name)]
    for way in wanted:
        if not _is_known(way, known):
            results["rows"].append(measured(way, rows))
            left = Counter(way.library for way in ways if not _is_known(way, known))
            results["missing"] = dict(left)  # settings to be measured yet
            print(results["rows"][-1], flush=True)
            write_json(path, results)


def measured(way: Way, rows: Rows) -> dict[str, Any]:
    """Return the row of a way: its cosines, or the reason why it has none."""
    began = time.monotonic()
    try:
        built = way.build(load_encoder(packaged_model()), rows)
        values = {split: rows.cosine(built.embed, split) for split in SPLITS}
    except FAILURES as error:
        traceback.print_exc()
        said = (str(error) or "no message").splitlines()[0]
        return {**way.facts(), "reason": f"{type(error).__name__}: {said}"}
    seconds = round(time.monotonic() - began, 1)
    found = {"megabytes": built.megabytes, "rounded": built.rounded, "seconds": seconds}
    return {**way.facts(), **values, **found}


def _is_known(way: Way, known: list[Any]) -> bool:
    return any(way.facts().items() <= row.items() for row in known)


def libraries() -> dict[str, str]:
    """Return the versions of the libraries that are installed."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    main()
