"""`quanttune.auto` beside NNCF's quantize_with_accuracy_control: MiniLM, OpenVINO, the same drops.

python -m benchmarks.rivals.accuracy_control --out benchmarks/results/xeon-2-cores

NNCF is to be installed. Both get the same calibration and validation rows and the same measure, the
cosine to the float model's embeddings; both files are run by OpenVINO, on test rows and, in turns
with the float file, on 8 x 128 tokens. Tensors may stay in float in either.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import quanttune as qt
from benchmarks import arguments
from benchmarks.accuracy.auto import Job, minilm
from benchmarks.deploy.nncf_file import rows_of
from benchmarks.deploy.openvino_file import OpenVinoFile
from benchmarks.deploy.runtimes import texts
from benchmarks.markdown_table import table
from benchmarks.provenance import commit
from quanttune.deploy.float_export import export_float
from quanttune.deploy.latency import in_turns, summarize
from quanttune.environment import environment
from quanttune.files import write_json

DROPS = (0.01, 0.002)  # of the cosine, which is 1 in float
THREADS, SECONDS, MINUTES = 2, 20.0, 20.0
FREE = {0: "batch", 1: "tokens"}


def main() -> None:
    parser = arguments.of_folder(__doc__)
    parser.add_argument("--files", type=Path, default=Path("build/accuracy-control"))
    options = parser.parse_args()
    options.files.mkdir(parents=True, exist_ok=True)
    job = minilm(0)
    exact = options.files / "float.onnx"
    export_float(job.model, job.calibration[0], exact, dynamic=FREE)
    files, rows = {"float": exact}, []
    for drop in DROPS:
        for name, way in {"NNCF": nncf, "quanttune": ours}.items():
            began = time.monotonic()
            path, facts = way(job, exact, drop)
            seconds = round(time.monotonic() - began, 1)
            files[f"{name} {drop}"] = path
            rows.append({"way": name, "drop": drop, "seconds": seconds, **facts})
    _, batch = texts()
    models = {name: OpenVinoFile(path, THREADS) for name, path in files.items()}
    timings = summarize(in_turns({n: partial(m, **batch) for n, m in models.items()}, SECONDS))
    for row in rows:
        name = f"{row['way']} {row['drop']}"
        row |= {"timing": asdict(timings[name]), **_worth(job, models[name])}
        print(row, flush=True)
    result = {"environment": environment(), "commit": commit(), "threads": THREADS, "rows": rows}
    write_json(options.out / "accuracy-control.json", result)


def ours(job: Job, exact: Path, drop: float) -> tuple[Path, dict[str, Any]]:
    validation, _ = job.split(0)
    chosen = qt.auto(
        job.model,
        target="openvino",
        data=job.calibration,
        refit_data=job.refit,
        evaluate=lambda model, part: job.measure(model, validation[part.start : part.stop]),
        rows=len(validation),
        drop=drop,
        minutes=MINUTES,
    )
    path = exact.with_name(f"quanttune-{drop}.onnx")
    qt.export_onnx(chosen.model, job.calibration[0], path, target="openvino", dynamic=FREE)
    return path, {"chosen": str(chosen.recipe), "ended": chosen.ended, "tried": len(chosen.tried)}


def nncf(job: Job, exact: Path, drop: float) -> tuple[Path, dict[str, Any]]:
    import nncf
    import openvino

    validation, _ = job.split(0)

    def measure(model: Any, items: Iterable[int]) -> tuple[float, None]:
        encoder = _encoder(lambda ids: model({"input_ids": ids.numpy()})[0])
        return job.measure(encoder, validation[list(items)]), None

    done = nncf.quantize_with_accuracy_control(
        openvino.Core().read_model(exact),
        rows_of(job.calibration),
        nncf.Dataset(range(len(validation))),
        measure,
        max_drop=drop,
        model_type=nncf.ModelType.TRANSFORMER,
    )
    path = exact.with_name(f"nncf-{drop}.xml")
    openvino.save_model(done, path, compress_to_fp16=False)
    return path, {}


def _worth(job: Job, file: OpenVinoFile) -> dict[str, float]:
    model = _encoder(lambda ids: file(input_ids=ids))
    return {
        name: job.measure(model, rows)
        for name, rows in zip(("validation", "test"), job.split(0), strict=True)
    }


def _encoder(states: Callable[[Tensor], Any]) -> Any:
    """Return what is called as the encoder is."""
    return lambda input_ids: SimpleNamespace(last_hidden_state=torch.as_tensor(states(input_ids)))


def control_table(measured: Any) -> str:
    """Return a row for each drop and way: what it is worth in OpenVINO, and how fast it is."""
    heads = ("drop", "way", "chosen", "validation", "test", "ms", "over float32", "seconds")
    rows = [
        (
            f"{row['drop']:.3f}", row["way"], row.get("chosen", ""),
            *(f"{row[rows]:.4f}" for rows in ("validation", "test")),
            f"{row['timing']['milliseconds']:.1f}", f"{row['timing']['speed']:.2f}x",
            f"{row['seconds']:.0f}",
        )
        for row in measured["rows"]
    ]  # fmt: skip
    return table(heads, rows, numbers=0)


if __name__ == "__main__":
    main()
