"""`quanttune doctor`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import options, remedies
from .terminal import Json, console, say, write_numbers

if TYPE_CHECKING:
    from ..deploy.products import Explanation

_REMEDIES = {"cpu": remedies.of_extension, "cuda": remedies.of_triton}


def run(
    onnx: Annotated[
        Path | None, typer.Option(help="A file of quanttune export: what is not faster, and why.")
    ] = None,
    json: Json = None,
) -> None:
    """Print versions, which kernels serve which device and why, and what would mend what is
    missing. Of an ONNX file: which products ONNX Runtime does not compute in integers here.

    Example: quanttune doctor --onnx sst2.onnx
    """
    from ..environment import environment
    from ..ops import backends

    facts = environment()
    for name, value in facts.items():
        if not isinstance(value, dict):
            console.print(f"{name:10} {value}", highlight=False)
    for package, version in facts["versions"].items():
        console.print(f"{package:12} {version or 'not installed'}", highlight=False)
    for device, backend in backends().items():
        console.print(f"{device:6} [bold]{backend.name}[/bold]: {backend.reason}", highlight=False)
        if backend.name == "reference" and device in _REMEDIES:
            say(f"       to mend it: {_REMEDIES[device]()}")  # one line, to be pasted
    if onnx:
        with options.of_extra("deploy"):
            from dataclasses import asdict

            from ..deploy.products import explain

            explanation = explain(onnx)
        _print_products(onnx, explanation)
        facts["onnx"] = asdict(explanation)
    write_numbers(json, facts)


def _print_products(path: Path, found: "Explanation") -> None:
    """Print the counts, then each product that is not computed in the integers of the file."""
    integers = sum(product.is_integer for product in found.products)
    say(f"{path}: {integers} of {len(found.products)} products in integers")
    alone = ", ".join(f"{count} {kind}" for kind, count in found.roundings.items())
    say(f"operators of their own: {alone}")
    if found.has_vnni is False:
        say("no VNNI: products of int8 saturate here, those of uint8 gain less speed")
    for product in found.products:
        if product.remark:
            say(f"{product.name} ({product.operator or 'not found'}): {product.remark}")
