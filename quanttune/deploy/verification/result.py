"""What `verify` finds, as data and as text."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from itertools import chain
from typing import Any

from .agreement import Distance, Layer

SHOWN = 5  # of the layers that differ most


@dataclass(frozen=True)
class Output:
    """An output of the file, and of the simulation with a little noise, beside the simulation's."""

    name: str
    magnitude: float  # of the simulation's largest value
    file: Distance
    noise: Distance
    same_codes: Distance  # of the first batch's, where each layer took the simulation's codes


@dataclass(frozen=True)
class Verification:
    """What `verify` found; prints as a table."""

    model: str
    layers: tuple[Layer, ...]  # in the order in which they are computed
    outputs: tuple[Output, ...]
    merged: tuple[str, ...]  # sites whose codes the file takes from another one's
    unused: tuple[str, ...]  # sites that no output needs, which the file leaves out
    floats: tuple[str, ...]  # sites of more than 8 bits, which the file computes in float
    problems: tuple[str, ...]  # sentences; the first may be the cause of others

    @property
    def passed(self) -> bool:
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {"passed": self.passed, **asdict(self)}

    def __str__(self) -> str:
        return table(self)


def joined(parts: Sequence[Verification]) -> Verification:
    """Return what was found of several files of one model as of one."""

    def all_of(name: str) -> tuple[Any, ...]:
        return tuple(dict.fromkeys(chain.from_iterable(getattr(part, name) for part in parts)))

    names = [field.name for field in fields(Verification) if field.name != "model"]
    found: dict[str, Any] = {name: all_of(name) for name in names}
    return Verification(model=parts[0].model, **found)


def table(found: Verification) -> str:
    """Return the layers that differ most, the outputs, and the problems."""
    worst = sorted(found.layers, key=lambda layer: (layer.beyond_one, layer.differ), reverse=True)
    worst = [layer for layer in worst if layer.differ][:SHOWN]
    lines = [f"{found.model}: {_layers(found)}"]
    if worst:
        header = ("layers that differ most", "codes", "differ", "by more than 1", "largest")
        lines += ["", *_aligned([header, *map(_cells, worst)])]
    rows: list[tuple[str, ...]] = [("outputs", "mean", "largest", "same argmax")]
    for output in found.outputs:
        rows.append((f"{output.name}: the file", *_numbers(output.file)))
        rows.append(("  the simulation with noise", *_numbers(output.noise)))
        rows.append(("  the file on the same codes before", *_numbers(output.same_codes)))
    return "\n".join([*lines, "", *_aligned(rows), "", *_verdict(found.problems)])


def _layers(found: Verification) -> str:
    same = sum(not layer.differ for layer in found.layers)
    text = f"{len(found.layers)} layers on the same codes before them, {same} without a difference"
    if found.merged:
        text += f"; {len(found.merged)} more round as another one does"
    if found.unused:
        text += f"; {len(found.unused)} more round what no output needs, and are not in the file"
    if found.floats:
        text += f"; {len(found.floats)} of more than 8 bits are computed in float, and not compared"
    return text


def _cells(layer: Layer) -> tuple[str, ...]:
    shares = (f"{layer.differ:.3%}", f"{layer.beyond_one:.3%}")
    return (layer.name, str(layer.values), *shares, str(layer.largest))


def _numbers(distance: Distance) -> tuple[str, ...]:
    argmax = "-" if distance.argmax is None else f"{distance.argmax:.2%}"
    return f"{distance.mean:.3g}", f"{distance.largest:.3g}", argmax


def _verdict(problems: Sequence[str]) -> list[str]:
    return [f"- {problem}" for problem in problems] or [
        "the file computes what the model simulates"
    ]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
