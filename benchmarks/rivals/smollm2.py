"""Quantize SmolLM2 by libraries for PyTorch modules, as they are documented, on its demo's rows.

python -m benchmarks.rivals.smollm2 --out DIR --only "modelopt.*SMOOTH|torchao"

The metric is the perplexity of the test rows. A run that was interrupted goes on where it stopped.
"""

import json
import re
import time
from typing import Any

from torch import Tensor

from benchmarks import arguments
from benchmarks.rivals import of_torch
from benchmarks.rivals.__main__ import FAILURES, libraries
from benchmarks.rivals.rows import ModelEmbedding
from benchmarks.rivals.ways import Way
from quanttune.demo.smollm2 import SmolLM2
from quanttune.environment import environment
from quanttune.files import write_json


class _Rows:
    """What libraries take their ranges from: the rows that ours are taken from."""

    def __init__(self, job: SmolLM2) -> None:
        self._job = job

    def calibration(self) -> list[Tensor]:
        return [batch["input_ids"] for batch in self._job.calibration()]


def main() -> None:
    parser = arguments.of_folder(__doc__)
    parser.add_argument("--only", default="", help="regular expression: library and setting")
    options = parser.parse_args()
    path = options.out / "rivals-smollm2.json"
    results = json.loads(path.read_text()) if path.exists() else {"rows": []}
    results |= {"libraries": libraries(), "environment": environment()}
    job = SmolLM2(0)
    for way in of_torch.ways():
        known = any(way.facts().items() <= row.items() for row in results["rows"])
        if known or way.bits != (8, 8) or not re.search(options.only, way.name):
            continue
        results["rows"].append({**way.facts(), **_measured(job, way)})
        print(results["rows"][-1], flush=True)
        write_json(path, results)


def _measured(job: SmolLM2, way: Way) -> dict[str, Any]:
    began = time.monotonic()
    try:
        built: Any = way.build(job.prepare(job.arms[0], lambda: None), _Rows(job))
        if not isinstance(built.embed, ModelEmbedding):
            return {"reason": "it makes a graph, which is not measured here"}
        found = job.measure(built.embed.model, "test")
    except FAILURES as error:
        return {"reason": f"{type(error).__name__}: {error}".splitlines()[0]}
    return {**found, "rounded": built.rounded, "seconds": round(time.monotonic() - began)}


if __name__ == "__main__":
    main()
