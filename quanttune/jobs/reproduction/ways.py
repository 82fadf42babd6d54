"""The rows of the tables: an arm, which is how the model was tuned, and how it is quantized."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ...quantization.methods import FQViT, Method, PTQ4ViT, Ranking
from ...quantization.methods.searching.scale_search import ScaleSearch

BASE, CONTROL, QUANTTUNE = "base", "control", "quanttune"
SHORT: dict[str, Any] = {
    "candidates": 5,
    "rounds": 1,
    "samples": 1,
}  # of a search: one turn, on one batch
TUNED = f"{QUANTTUNE}_"  # before an alpha


@dataclass(frozen=True)
class Way:
    """A row of a table.

    Args:
        name: as `--methods` takes it; label: as a table shows it.
        arm: of which model. One that is tuned has a figure in float, too.
        scheme: arguments of `quantize` other than bits and data; None leaves the model in float.
        published: the row of the published figures that stand beside.
    """

    name: str
    label: str
    arm: str = BASE
    scheme: Mapping[str, Any] | None = field(default_factory=dict)
    published: str = ""

    @property
    def row(self) -> str:
        return self.published or self.name

    def widths(self, bits: Sequence[int]) -> list[int]:
        """Return the widths of its cells; 32 is float."""
        if self.scheme is None:
            return [32]
        return [*bits] if self.arm == BASE else [32, *bits]

    def options(self, short: bool) -> dict[str, Any]:
        """Return arguments of `quantize`; short cuts a search, which else takes minutes."""
        given = dict(self.scheme or {})
        methods: Sequence[Method] = given.pop("methods", ())
        if short:
            methods = [
                replace(method, **SHORT) if isinstance(method, ScaleSearch) else method
                for method in methods
            ]
        return {**given, "methods": methods}


_AFFINE = {"calibrator": "omse", "symmetric": False}
_FQ_VIT = {"coverage": "full", "methods": [FQViT(log_softmax=True)]}
_PTQ4VIT, _RANKING = [PTQ4ViT()], [Ranking()]

WAYS = {
    way.name: way
    for way in (
        Way("baseline", "Baseline", scheme=None),
        Way("minmax", "Min-max"),
        Way("ema", "EMA", scheme={"calibrator": "ema"}),
        Way("percentile", "Percentile", scheme={"calibrator": "percentile_ema"}),
        Way("omse", "OMSE", scheme={"calibrator": "omse"}),
        Way("omse_affine", "OMSE, zero points", scheme=_AFFINE, published="omse"),
        Way("fq_vit", "FQ-ViT", scheme=_FQ_VIT),
        Way("ptq4vit", "PTQ4ViT", scheme={"coverage": "linear", "methods": _PTQ4VIT}),
        Way(
            "ptq4vit_strict",
            "PTQ4ViT, all rounded",
            scheme={"coverage": "full", "methods": _PTQ4VIT},
        ),
        Way("ranking", "Ranking", scheme={"coverage": "linear", "methods": _RANKING}),
        Way("clipped_softmax", "Quantizable: clipped softmax", "clipped_softmax"),
        Way("gated_attention", "Quantizable: gated attention", "gated_attention"),
        Way(CONTROL, "Control (alpha 0)", CONTROL),
    )
}
CALIBRATORS = ("baseline", "minmax", "ema", "percentile", "omse", "omse_affine")
QUIET = ("clipped_softmax", "gated_attention")
VISION = (*CALIBRATORS, "fq_vit", "ptq4vit", "ptq4vit_strict", "ranking", *QUIET, CONTROL)
LANGUAGE = (*CALIBRATORS, *QUIET, CONTROL)


def ways_of(names: Sequence[str], alphas: Sequence[float]) -> list[Way]:
    """Return the rows of these names, with one of QuantTune for each alpha."""
    tuned = [
        Way(f"{TUNED}{alpha:g}", f"QuantTune, alpha {alpha:g}", f"{TUNED}{alpha:g}",
            published=QUANTTUNE)
        for alpha in alphas
    ]  # fmt: skip
    found = [WAYS[name] for name in names if name != QUANTTUNE]
    return [*found, *(tuned if QUANTTUNE in names else [])]
