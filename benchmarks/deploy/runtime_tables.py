"""The table of runtimes, of what runtimes.py has measured."""

from typing import Any

from benchmarks.deploy.onnx_agreement import WIDTHS
from benchmarks.markdown_table import table

SHOWN = (("onnxruntime", "uint8"), ("onnxruntime", "int8"), ("openvino", "int8"))
NAMES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
HEADS = (
    "model", "runtime", "file", "sizes", "products of integers", "cosine", "noise's",
    "in WebAssembly", "speed, 1 thread", "2 threads",
)  # fmt: skip


LINEAR, CPU, NNCF = "linear-8-int8", "linear-8-cpu", "nncf"
LINEAR_HEADS = (
    "model", "sizes", "threads", "ONNX Runtime", "onnxruntime-cpu", "OpenVINO",
    "NNCF's file in OpenVINO", "cosine to float", "NNCF's",
)  # fmt: skip


def linear_table(measured: Any) -> str:
    """Return speeds of files whose products alone are integers, beside NNCF's of the same."""
    rows, times = [], [row for row in measured["times"] if row["coverage"] == "linear"]
    for row in times:
        if row["runtime"] != "openvino":
            continue
        key = {name: row[name] for name in ("model", "shapes", "threads")}
        others = [r for r in times if {**key, "runtime": "onnxruntime"}.items() <= r.items()]
        speeds = [
            f"{timings[kind]['speed']:.2f}x" if kind in timings else ""
            for timings, kind in (
                *((other["timings"], kind) for other in others for kind in (LINEAR, CPU)),
                (row["timings"], LINEAR),
                (row["timings"], NNCF),
            )
        ]
        found = row["cosine_to_float"]
        cosines = (f"{found[kind]:.4f}" if kind in found else "" for kind in (LINEAR, NNCF))
        rows.append((key["model"], key["shapes"], str(key["threads"]), *speeds, *cosines))
    return table(LINEAR_HEADS, sorted(rows), numbers=0)


EDGE_HEADS = (
    "model", "products of integers", "cosine to the simulation", "its noise's", "of float",
    "over its own float", "MB", "float's MB",
)  # fmt: skip


def edge_table(measured: Any, target: str) -> str:
    """Return what XNNPACK answers for one of the runtimes: cosines in the mean, and the lowest."""
    rows = []
    for row in measured["rows"]:
        if row["target"] != target:
            continue
        found, exact = row["integer"], row["float"]["XNNPACK"]
        program = found["XNNPACK"]
        count = program["products"]["integer"] + program["products"]["float"]
        cosines = (
            f"{found[kind]['cosine']:.4f}, {found[kind]['lowest_cosine']:.4f}"
            for kind in ("XNNPACK", "noise", "simulation_to_float")
        )
        speed = exact["fastest_seconds"] / program["fastest_seconds"]
        sizes = (f"{one['bytes'] / 1e6:.2f}" for one in (program, exact))
        share = f"{program['products']['integer']} of {count}"
        rows.append((row["model"], share, *cosines, f"{speed:.2f}x", *sizes))
    return table(EDGE_HEADS, rows, numbers=0)


def runtimes_table(measured: Any) -> str:
    """Return a row for each model, runtime and file that was measured at all widths."""
    rows = []
    for model in dict.fromkeys(row["model"] for row in measured["rows"]):
        for runtime, kind in SHOWN:
            for shapes in ("dynamic", "static"):
                key = {"model": model, "shapes": shapes}
                found = [
                    r
                    for r in measured["rows"]
                    if {**key, "coverage": "full", "act_dtype": kind}.items() <= r.items()
                ]
                found.sort(key=lambda row: -row["bits"])
                if len(found) == len(WIDTHS):
                    speeds = (
                        _speeds(measured, {**key, "runtime": runtime}, kind, t) for t in (1, 2)
                    )
                    rows.append(
                        (model, NAMES[runtime], kind, shapes, *_cells(found, runtime), *speeds)
                    )
    return table(HEADS, rows, numbers=0)


def _cells(found: list[Any], runtime: str) -> tuple[str, ...]:
    integer = _joined(str(row["runtimes"][runtime]["integer"]) for row in found)
    cosines = _joined(f"{row['runtimes'][runtime]['cosine']:.4f}" for row in found)
    noise = _joined(f"{row['noise']:.4f}" for row in found)
    web = (row["runtimes"].get("onnxruntime-web") for row in found if runtime == "onnxruntime")
    browser = _joined(f"{facts['cosine']:.4f}" for facts in web if facts)
    return f"{integer} of {found[0]['products']}", cosines, noise, browser


def _speeds(measured: Any, key: dict[str, Any], kind: str, threads: int) -> str:
    for row in measured["times"]:
        if {**key, "threads": threads, "coverage": "full"}.items() <= row.items():
            timings = row["timings"]
            return _joined(f"{timings[f'full-{bits}-{kind}']['speed']:.2f}x" for bits in WIDTHS)
    return ""


def _joined(cells: Any) -> str:
    """Return cells in a row, or one where all are the same."""
    cells = list(cells)
    return cells[0] if len(set(cells)) == 1 else ", ".join(cells)
