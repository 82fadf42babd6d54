"""A figure as a page holds it."""

from io import BytesIO
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.text import Text


class Plain(Figure):
    """A figure whose texts hold no formulas: a name may have a $."""

    def draw(self, renderer: Any) -> None:
        with rc_context({"text.parse_math": False}):  # ticks are made while it is drawn
            for text in self.findobj(Text):
                text.set_parse_math(False)  # type: ignore[attr-defined]
            super().draw(renderer)


def svg(figure: Figure) -> bytes:
    """Return a figure as an SVG file that is the same for the same numbers."""
    buffer = BytesIO()
    with rc_context({"svg.hashsalt": "quanttune"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
