"""Quantize SmolLM2 in many ways and measure the perplexity of held-out docstrings.

python -m benchmarks.accuracy.smollm2 --out benchmarks/results/epyc-2-cores
python -m benchmarks.accuracy.smollm2 --out DIR --split test --only "*rotate*"

A way takes minutes, on test rows seven times as long as on validation rows. What is in the file
already is not measured again, so that an interrupted run goes on. docs/results.md has the table.
"""

import json
import time
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import quanttune as qt
from benchmarks import arguments
from quanttune.demo.smollm2 import SmolLM2
from quanttune.environment import environment
from quanttune.files import write_json
from quanttune.quantization.methods import SmoothInputs, SmoothQuant

LINEAR, SUMS_IN_FLOAT, EVERYTHING = (
    {"coverage": "linear"},
    {"coverage": "full_no_softmax", "residual": False},
    {"coverage": "full_no_softmax"},
)
COVERAGES = {"linear": LINEAR, "all but sums": SUMS_IN_FLOAT, "everything": EVERYTHING}
DOWN = {"overrides": {"*.down_proj.input_quantizer": {"bits": 16}}}
ROTATED: dict[str, Any] = {"methods": ["rotate"]}
SMOOTHED = ["smooth_inputs", SmoothQuant(alpha=0.9)]
# what is done beside coverage and min-max
REMEDIES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "mse": {"calibrator": "mse"},
    "omse": {"calibrator": "omse"},
    "percentile": {"calibrator": "percentile"},
    "zero points": {"symmetric": False},
    "smooth_inputs": {"methods": ["smooth_inputs"]},
    "erq": {"methods": ["erq"]},
    "inputs of down_proj at 16 bits": DOWN,
    "rotate": ROTATED,
    "rotate, mse": {**ROTATED, "calibrator": "mse"},
    "rotate, omse": {**ROTATED, "calibrator": "omse"},
    "rotate, smooth_inputs": {"methods": ["rotate", "smooth_inputs"]},
    "rotate, smooth_inputs .8": {"methods": ["rotate", SmoothInputs(alpha=0.8)]},
    "rotate, erq": {"methods": ["rotate", "erq"]},
    "rotate, zero points": {**ROTATED, "symmetric": False},
    "rotate, inputs of down_proj at 16 bits": {**ROTATED, **DOWN},
    "smoothed": {"methods": SMOOTHED},
    "rotate, smoothed": {"methods": ["rotate", *SMOOTHED]},
    "rotate, smoothed, erq": {"methods": ["rotate", *SMOOTHED, "erq"]},
    "rotate, smoothed, mse": {"methods": ["rotate", *SMOOTHED], "calibrator": "mse"},
    "rotate, smoothed, erq, zero points": {
        "methods": ["rotate", *SMOOTHED, "erq"],
        "symmetric": False,
    },
}
PREFIX = "kept prefix; "


def ways() -> dict[str, dict[str, Any]]:
    """Return the options of `quantize` by the names of coverage and remedy, and with a prefix."""
    return {
        f"{coverage}: {prefix}{remedy}": {**covered, **options}
        for coverage, covered in COVERAGES.items()
        for prefix in ("", PREFIX)
        for remedy, options in REMEDIES.items()
    }


def main() -> None:
    parser = arguments.of_folder(__doc__)
    parser.add_argument("--split", choices=("validation", "test"), default="validation")
    parser.add_argument("--only", default="linear: *", help="a pattern of ways: fnmatch")
    options = parser.parse_args()
    path = options.out / "smollm2.json"
    results = json.loads(path.read_text()) if path.exists() else {"rows": []}
    chosen = {name: way for name, way in ways().items() if fnmatchcase(name, options.only)}
    job = SmolLM2(0)
    _measure(job, path, results, options.split, {"float": None, f"{PREFIX}float": None, **chosen})


def _measure(
    job: SmolLM2, path: Path, results: dict[str, Any], split: str, ways: Mapping[str, Any]
) -> None:
    results |= {"caveats": list(job.caveats[1:-1]), "environment": environment()}
    done = {(row["split"], row["way"]) for row in results["rows"]}
    for name, options in ways.items():
        if (split, name) in done:
            continue
        began = time.monotonic()
        model = job.prepare(job.arms[0], lambda: None)
        if PREFIX in name:
            qt.prefix(model, data=job.calibration())
        if options is not None:
            qt.quantize(model, 8, data=job.calibration(), **options)
        row = {"split": split, "way": name, **job.measure(model, split)}
        row["seconds"] = round(time.monotonic() - began)
        print(row, flush=True)
        results["rows"].append(row)
        write_json(path, results)


if __name__ == "__main__":
    main()
