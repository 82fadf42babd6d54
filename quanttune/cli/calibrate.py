"""`quanttune calibrate`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ..jobs.settings import Settings

# quanttune itself has imported them
from ..quantization.calibrators import AFFINE, CALIBRATORS
from ..quantization.coverage import PRESETS
from ..quantization.methods import METHODS
from ..quantization.prefixes.prefix import PREFIXES
from ..quantization.scheme import DYNAMIC, Scheme
from . import options
from .terminal import Json, say, showing, write_numbers


def _quantization(
    bits: Annotated[int, typer.Option(help="Of activations and weights, 2 to 16.")] = 8,
    weight_bits: Annotated[int | None, typer.Option(help="Of weights, if others.")] = None,
    calibrator: Annotated[
        str, typer.Option(help="How ranges are chosen, such as minmax or percentile.")
    ] = "minmax",
    coverage: Annotated[
        str,
        typer.Option(help=f"What is quantized: {', '.join(PRESETS)}."),
    ] = "full_no_softmax",
    weights: Annotated[
        str, typer.Option(help="A scale per channel, tensor, or group of so many inputs: 128.")
    ] = "channel",
    residual: Annotated[bool, typer.Option(help="Quantize the residual stream.")] = True,
    symmetric: Annotated[
        bool, typer.Option(help="Activations without zero points; weights have none.")
    ] = True,
    override: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN=BITS", help="Other bits, such as '*.fc2=16', 'head=float'."),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help=f"Makes rounding cost less: {', '.join(METHODS)}. Repeat for several.",
        ),
    ] = None,
) -> dict[str, Any]:
    """Check the arguments of `quanttune.quantize`, and return them."""
    names = (*CALIBRATORS, DYNAMIC) if symmetric else AFFINE
    options.one_of("--calibrator", calibrator, names, "" if symmetric else " with --no-symmetric")
    options.one_of("--coverage", coverage, PRESETS)
    granularity = options.granularity(weights)
    for name in method or ():
        options.one_of("--method", name, METHODS)
    quantization: dict[str, Any] = {
        "bits": bits, "weight_bits": weight_bits, "calibrator": calibrator, "coverage": coverage,
        "weights": granularity, "residual": residual, "symmetric": symmetric,
        "overrides": _overrides(override or []), "methods": method or (),
    }  # fmt: skip
    Scheme(**quantization)  # checks the widths
    return quantization


@options.grouped(settings=options.dataset, quantization=_quantization)
def run(
    settings: Settings,
    quantization: dict[str, Any],
    out: Annotated[Path, typer.Option(help="Folder of the quantized model.")],
    limit: Annotated[int, typer.Option(min=1, help="Rows, drawn by the seed.")] = 320,
    prefix: Annotated[
        str | None,
        typer.Option(
            metavar="data|bos|IDS",
            help="Of a language model: tokens whose keys and values are kept before every "
            "sequence; that the data ask for, that begin texts, or such as 1,198.",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Do all but write.")] = False,
    json: Json = None,
) -> None:
    """Quantize a model with the ranges of your data, and write it to a folder.

    Example: quanttune calibrate sst2/model --data nyu-mll/glue --subset sst2 --bits 8
    --calibrator percentile --override classifier=float --out sst2-w8a8
    """
    from ..jobs.calibrate import calibrate

    with showing() as progress:
        outcome = calibrate(
            settings,
            quantization,
            out,
            limit=limit,
            prefix=None if prefix is None else _prefix(prefix),
            dry_run=dry_run,
            say=say,
            progress=progress,
        )
    if not dry_run:
        say(f"the model is in {out}")
    write_numbers(json, outcome)


def _prefix(text: str) -> str | list[int]:
    if text in PREFIXES:
        return text
    ids = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in ids):
        raise ValueError(f"--prefix takes {', '.join(PREFIXES)} or token ids, got {text!r}")
    return [int(part) for part in ids]


def _overrides(texts: list[str]) -> dict[str, dict[str, int] | None]:
    overrides: dict[str, dict[str, int] | None] = {}
    for text in texts:
        pattern, _, bits = text.rpartition("=")
        if not pattern or not (bits == "float" or bits.isdecimal()):
            raise ValueError(f"--override takes PATTERN=BITS or PATTERN=float, got {text!r}")
        overrides[pattern] = None if bits == "float" else {"bits": int(bits)}
    return overrides
