"""What is done to a float model, as arguments of the functions that do it."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from ..masks import Mask
from ..progress import Progress, silent
from ..quantization.prefixes.prefix import prefix as keep_prefix
from ..quantization.simulation import quantize
from ..refitting.refit import refit


@dataclass(frozen=True)
class Recipe:
    """A refit, a kept prefix, a quantization, in this order; plain data, so that a file holds it.

    Args:
        quantization: arguments of `quantize` other than data; methods by their names.
        refit: the tolerance of `refit`; None leaves it out.
        prefix: token ids that a language model keeps.
    """

    quantization: Mapping[str, Any] = field(default_factory=dict)
    refit: float | None = None
    prefix: Sequence[int] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON; `Recipe(**data)` is the same again."""
        return asdict(self)

    def __str__(self) -> str:
        options = dict(self.quantization)
        spared = options.get("overrides") or ()
        words = [
            "refit" * (self.refit is not None),
            "prefix" * bool(self.prefix),
            options.get("calibrator", "minmax"),
            *options.get("methods", ()),
            f"{len(spared)} sites in float" * bool(spared),
        ]
        return ", ".join(filter(None, words))


class Builder:
    """Makes quantized models of a float one, which it leaves as it is.

    Args:
        data: batches that ranges and methods read; refit_data: those that refits do.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Sequence[Any],
        refit_data: Sequence[Any],
        mask: Mask | None = "attention_mask",
        progress: Progress = silent,
    ) -> None:
        self.model, self.data, self.mask, self.progress = model, data, mask, progress
        self._refit_data = refit_data
        self._refitted: dict[float | None, nn.Module] = {None: model}

    def make(self, recipe: Recipe) -> nn.Module:
        """Return a model that was quantized by a recipe; a refit is done once, and kept.

        Raises:
            ValueError: the model cannot be treated so.
        """
        if recipe.refit not in self._refitted:
            options: Any = {"tolerance": recipe.refit, "mask": self.mask}
            refitted = copy.deepcopy(self.model)
            refit(refitted, self._refit_data, progress=self.progress, **options)
            self._refitted[recipe.refit] = refitted
        model = copy.deepcopy(self._refitted[recipe.refit])
        if recipe.prefix:
            keep_prefix(model, recipe.prefix)
        options = {"data": self.data, "mask": self.mask, "progress": self.progress}
        return quantize(model, **options, **recipe.quantization)
