"""NoisyQuant: a fixed noise that is added before an input is rounded, and taken out of the bias."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..channel_grids import NoisyQuantizer
from ..quantizer import ActivationQuantizer
from ..running import Data, in_float
from ..scheme import Scheme
from .method import Regridding
from .rounding.moments import groups_of
from .searching.candidates import Weight, covering
from .searching.products import Linears, Records, record
from .searching.scale_search import first_batches, is_rounded_norm, passes_of
from .searching.sources import sources_of

FACTORS = torch.linspace(0.5, 1.2, 100, dtype=torch.float64).tolist()  # of ranges
ROUNDS = 2
SHARES = torch.linspace(0, 1, 41, dtype=torch.float64).tolist()[1:]  # of a step: noise


@dataclass(frozen=True)
class NoisyQuant(Regridding):
    """Add a noise of each channel to what Linear and Conv1D modules round; biases take it out.

    What is rounded is x + n, on one uniform grid; W @ n comes out of the bias, so that the products
    are those of integers. Of what is uniform within steps nothing is won by it; of a peak between
    two codes, as behind a GELU, much: each channel meets the grid at another place. Tried, in turn,
    are 100 factors of the range; a shift, the same for all channels, up to half a step to either
    side; and noise, uniform within up to one step to either side, drawn once. Each is taken where
    it lowers the squared error of the outputs, weights rounded to nearest; so no product is worse
    than before. Layers that are given the same tensor have the same noise. Where none helps, a site
    stays on its plain grid.

    Args:
        samples: of `data`, as many batches as hold these.
        seed: of the noise.

    Raises:
        ValueError: no input of such a module is rounded, or activations have zero points, or no
            constant ranges.

    Source: Liu et al., NoisyQuant, arXiv 2211.16056. Their code draws a Gaussian of mean -1; this
    is the paper's uniform noise.
    """

    name: ClassVar[str] = "noisyquant"
    samples: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"samples must be 1 or more, got {self.samples}")

    def apply(self, model: nn.Module, scheme: Scheme, data: Data) -> None:
        self.check_constant_symmetric(scheme)
        few = replace(data, batches=list(first_batches(model, data, self.samples)))
        with in_float(model):
            groups = groups_of(model, few, f"{self.name}: finding layers")
        rounded = [Linears(group) for group in groups if _is_rounded(group.leader)]
        if not rounded:
            raise ValueError(
                "noisyquant is for inputs of Linear modules, none of which is rounded: take a "
                "coverage such as linear"
            )
        norms: dict[Any, Any] = dict(sources_of(model, few, is_rounded_norm))
        generator = torch.Generator().manual_seed(self.seed)
        found: dict[nn.Module, ActivationQuantizer] = {}
        done = 0
        for chosen in passes_of(model, rounded, few):
            for one, records in zip(chosen, record(model, chosen, few, False), strict=True):
                data.progress(self.name, done, len(rounded))
                before = norms[one.leader].output_quantizer if one.leader in norms else None
                noise = 2 * torch.rand(records.left[0].shape[-1], generator=generator) - 1
                best = _Inputs(one, records, before).search(noise)
                found |= {layer.module: best for layer in one.layers}
                done += 1
        data.progress(self.name, done, len(rounded))
        for module, best in found.items():  # at the end: the passes above are of the float model
            module.input_quantizer = copy.deepcopy(best)


class _Inputs:
    """What some layers are given, and what rounding it costs in their outputs."""

    @torch.no_grad()
    def __init__(
        self, linears: Linears, records: Records, before: ActivationQuantizer | None
    ) -> None:
        self.original: ActivationQuantizer = linears.leader.input_quantizer
        weights = [Weight(layer, ()) for layer in linears.layers]
        self._exact = [[x @ weight.rows.T for x in records.left] for weight in weights]
        self._rows = [weight.rounded() for weight in weights]
        self._given = records.left if before is None else [before.round(x) for x in records.left]

    @torch.no_grad()
    def loss(self, quantizer: ActivationQuantizer) -> float:
        """Return the squared error of all outputs."""
        rounded = [quantizer.round(x) for x in self._given]
        return sum(
            float((x @ rows.T - y).square().sum(dtype=torch.float64))
            for rows, exact in zip(self._rows, self._exact, strict=True)
            for x, y in zip(rounded, exact, strict=True)
        )

    def search(self, noise: Tensor) -> ActivationQuantizer:
        """Return the best of the original, of other ranges, and with shifts and noise added."""
        best, ones = self.original, torch.ones_like(noise)
        for _ in range(ROUNDS):  # the best range is another one, with noise
            best = self._best(best, (covering(best, factor) for factor in FACTORS))
            shifts = (_noisy(best, ones, side * share / 2) for side in (-1, 1) for share in SHARES)
            best = self._best(best, shifts)
            best = self._best(best, (_noisy(best, noise, share) for share in SHARES))
        return best

    def _best(
        self, first: ActivationQuantizer, others: Iterator[ActivationQuantizer]
    ) -> ActivationQuantizer:
        return min([first, *others], key=self.loss)


def _noisy(quantizer: ActivationQuantizer, noise: Tensor, share: float) -> NoisyQuantizer:
    """Return a grid with noise beneath, so many steps of it beside what there is."""
    made = NoisyQuantizer.after(quantizer, len(noise))
    added = noise.to(made.noise) * (share * made.scale)
    there = quantizer.noise if isinstance(quantizer, NoisyQuantizer) else torch.zeros_like(added)
    made.noise = there + added
    return made


def _is_rounded(module: Any) -> bool:
    quantizer = module.input_quantizer
    return isinstance(quantizer, ActivationQuantizer) and quantizer.calibrated
