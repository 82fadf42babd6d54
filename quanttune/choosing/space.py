"""What can be done to a model for a target: axes of choices, and where a search begins."""

from collections.abc import Mapping, Sequence
from typing import Any

from .recipe import Recipe
from .targets import Target

Point = dict[str, Any]  # a value for each axis
Axes = Mapping[str, Sequence[Any]]  # the first value of each is the plain one
Choice = tuple[str, str]  # an axis, and a value on it as text

TOLERANCE = 0.1  # of a refit
# at most one method of each, in the order in which they act; the cheapest first
METHOD_AXES = {
    "rotation": ("", "rotate"),
    "inputs": ("", "smooth_inputs"),
    "norms": ("", "smoothquant", "repq", "outlier_suppression", "aweq"),
    "rounding": ("", "bias_correction", "erq", "gptq"),
}
_SMOOTHED = {"inputs": "smooth_inputs", "norms": "repq", "rounding": "erq"}
_ROTATED = {"rotation": "rotate", "inputs": "smooth_inputs", "norms": "smoothquant"}
_REFITTED = {"refit": TOLERANCE, "calibrator": "omse", "norms": "repq", "rounding": "erq"}


class Space:
    """The choices that a target leaves.

    Args:
        prefix: token ids that the model could keep; none if it cannot.
        widths: of `quantize`, bits and weight_bits.
    """

    def __init__(
        self, target: Target, prefix: Sequence[int] = (), widths: Mapping[str, Any] | None = None
    ) -> None:
        self._scheme = {**target.scheme, **(widths or {})}
        self.axes: Axes = {
            "calibrator": target.calibrators,
            **({"prefix": ((), tuple(prefix))} if prefix else {}),
            **METHOD_AXES,
            "refit": (None, TOLERANCE),
        }

    def starts(self) -> list[Point]:
        """Return what was best somewhere in docs/results.md, and each calibrator: the plain one
        first.
        """
        calibrators = [{"calibrator": name} for name in self.axes["calibrator"][1:]]
        behind = [{"prefix": self.axes["prefix"][1], **_ROTATED}] if "prefix" in self.axes else []
        return [self._point(some) for some in ({}, *behind, _SMOOTHED, *calibrators, _REFITTED)]

    def recipe(self, point: Mapping[str, Any]) -> Recipe:
        """Return the arguments that a point stands for; "overrides" may be in it besides."""
        quantization = {
            **self._scheme,
            "calibrator": point["calibrator"],
            "methods": [name for axis in METHOD_AXES if (name := point[axis])],
            **({"overrides": point["overrides"]} if point.get("overrides") else {}),
        }
        return Recipe(quantization, point["refit"], list(point.get("prefix", ())))

    def _point(self, some: Mapping[str, Any]) -> Point:
        return {axis: some.get(axis, values[0]) for axis, values in self.axes.items()}


def neighbours(point: Point, axes: Axes, after: str = "") -> dict[Choice, Point]:
    """Return the points that differ by one choice, and by which: those of the axis `after` last."""
    names = list(axes)
    first = names.index(after) + 1 if after in names else 0
    return {
        (axis, repr(value)): {**point, axis: value}
        for axis in (*names[first:], *names[:first])
        for value in axes[axis]
        if value != point[axis]
    }
