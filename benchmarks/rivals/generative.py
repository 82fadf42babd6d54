"""Quantize SmolLM2 or Whisper by libraries for PyTorch modules, as they are documented.

python -m benchmarks.rivals.generative smollm2 --out DIR --only "modelopt.*SMOOTH|torchao"

On the test rows of their demos, by the demo's metric. A run that was interrupted goes on where it
stopped.
"""

import json
import re
import time
from typing import Any

from benchmarks import arguments
from benchmarks.rivals import of_torch
from benchmarks.rivals.__main__ import FAILURES, libraries
from benchmarks.rivals.rows import ModelEmbedding
from benchmarks.rivals.ways import Way
from quanttune.demo import recipe
from quanttune.environment import environment
from quanttune.files import write_json


def main() -> None:
    parser = arguments.of_folder(__doc__)
    parser.add_argument("task", choices=("smollm2", "whisper"))
    parser.add_argument("--only", default="", help="regular expression: library and setting")
    options = parser.parse_args()
    path = options.out / f"rivals-{options.task}.json"
    results = json.loads(path.read_text()) if path.exists() else {"rows": []}
    results |= {"libraries": libraries(), "environment": environment()}
    job = recipe(options.task)(0)
    for way in of_torch.ways():
        known = any(way.facts().items() <= row.items() for row in results["rows"])
        if known or way.bits != (8, 8) or not re.search(options.only, way.name):
            continue
        results["rows"].append({**way.facts(), **_measured(job, way)})
        print(results["rows"][-1], flush=True)
        write_json(path, results)


def _measured(job: Any, way: Way) -> dict[str, Any]:
    began = time.monotonic()
    try:
        built: Any = way.build(job.prepare(job.arms[0], lambda: None), job)
        if not isinstance(built.embed, ModelEmbedding):
            return {"reason": "it makes a graph, which is not measured here"}
        found = job.measure(built.embed.model, "test")
    except FAILURES as error:
        return {"reason": f"{type(error).__name__}: {error}".splitlines()[0]}
    return {**found, "rounded": built.rounded, "seconds": round(time.monotonic() - began)}


if __name__ == "__main__":
    main()
