"""`quanttune bench`."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table

from . import options
from .terminal import Json, console, say, showing, write_numbers


def run(
    model: Annotated[str, typer.Argument(help="A folder of quanttune calibrate.")],
    onnx: Annotated[
        Path, typer.Option(help="The file, or folder, that quanttune export made of it.")
    ],
    task: options.Task = None,
    batch_size: options.BatchSize = 8,
    tokens: options.Tokens = 128,
    threads: Annotated[
        list[int] | None,
        typer.Option(help="Threads of one operator; repeat for several.", show_default="1, 2"),
    ] = None,
    seed: options.Seed = 0,
    json: Json = None,
) -> None:
    """Time a file of integers in ONNX Runtime beside the same model in float.

    Both take turns on the same random rows, after their answers were checked.

    Example: quanttune bench sst2-w8a8 --onnx sst2.onnx --threads 1 --json latency.json
    """
    settings = options.dataset(model, "", task, tokens=tokens, batch_size=batch_size, seed=seed)
    with options.of_extra("deploy"):
        from ..jobs.bench import bench

        with showing() as progress:
            outcome = bench(settings, onnx, threads=threads or (1, 2), progress=progress)
    _print(outcome)
    write_numbers(json, outcome)


def _print(outcome: dict[str, Any]) -> None:
    """Print the times of a file, or of each part of an encoder-decoder, and the machine's name."""
    for name, timed in outcome.get("parts", {"file": outcome}).items():
        _print_times(name, timed)
    facts = outcome["environment"]
    vnni = {True: "VNNI", False: "no VNNI", None: "VNNI unknown"}[facts["vnni"]]
    version = facts["versions"]["onnxruntime"]
    say(f"onnxruntime {version}; {facts['processor']}, {facts['cores']} cores, {vnni}")


def _print_times(part: str, timed: dict[str, Any]) -> None:
    """Print a row for each file and number of threads, the sizes and the inputs."""
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("threads", part, "median ms", "quartiles ms", "rows/s", "speed"):
        table.add_column(column, justify="left" if column == part else "right")
    for threads, files in timed["latency"].items():
        for name, timing in files.items():
            quartiles = " to ".join(f"{t:.4g}" for t in timing["quartiles"])
            table.add_row(
                str(threads),
                name,
                f"{timing['milliseconds']:.4g}",
                quartiles,
                f"{timing['rows_per_second']:.4g}",
                f"{timing['speed']:.2f}x",
            )
    console.print(table)
    sizes = timed["bytes"]
    megabytes = [f"{sizes[name] / 1e6:.1f} MB" for name in ("float", "integer")]
    say(f"{part}: {megabytes[0]} float, {megabytes[1]} integer, {100 * sizes['ratio']:.0f} %")
    shapes = [f"{n} {x}" for n, x in timed["inputs"].items() if not n.startswith("past_")]
    say(", ".join(shapes))
