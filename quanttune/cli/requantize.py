"""`quanttune requantize`."""

from pathlib import Path
from typing import Annotated

import typer

from . import options
from .terminal import Json, say, write_numbers


def run(
    model: Annotated[str, typer.Argument(help="A folder of quanttune calibrate.")],
    out: Annotated[Path, typer.Option(help="Folder of the other model.")],
    bits: Annotated[
        int | None, typer.Option(help="Of activations and weights, 2 to 16.", show_default="kept")
    ] = None,
    weight_bits: Annotated[int | None, typer.Option(help="Of weights, if others.")] = None,
    weights: Annotated[
        str | None,
        typer.Option(help="A scale per channel, tensor, or group of so many inputs: 128."),
    ] = None,
    symmetric: Annotated[bool, typer.Option("--symmetric", help="Take zero points away.")] = False,
    power_of_two: Annotated[
        bool, typer.Option("--power-of-two", help="Make all scales powers of two.")
    ] = False,
    correct_weights: Annotated[
        bool, typer.Option("--correct-weights", help="Keep the sums of rounded rows.")
    ] = False,
    task: options.Task = None,
    json: Json = None,
) -> None:
    """Give a quantized model another scheme, from its ranges and weights, without data.

    Example: quanttune requantize sst2-w8a8 --power-of-two --out sst2-shifts

    Example: quanttune requantize sst2-affine --symmetric --out sst2-symmetric
    """
    changes = {
        "bits": bits,
        "weights": None if weights is None else options.granularity(weights),
        "weight_bits": weight_bits,
        "symmetric": True if symmetric else None,
        "power_of_two": power_of_two,
        "correct_weights": correct_weights,
    }
    if not any(changes.values()):
        raise ValueError("nothing is to change: give --bits, --power-of-two, --symmetric or others")
    settings = options.dataset(model, "", task)
    from ..jobs.requantize import requantize

    outcome = requantize(settings, changes, out, say=say)
    say(f"the model is in {out}")
    write_numbers(json, outcome)
