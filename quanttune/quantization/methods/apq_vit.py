"""APQ-ViT: scales by what blocks return, where it matters; probabilities that keep their order."""

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor, nn

from ..caches import without_caches
from ..quantizer import ActivationQuantizer
from ..running import Data, evaluating
from ..scheme import Scheme
from ..value_grids import UnsignedQuantizer
from .searching.blocks import BlockSearch, blocks_of
from .searching.candidates import Activation
from .searching.metrics import METRICS
from .searching.products import Records, record
from .searching.scale_search import ScaleSearch, first_batches, searched_in


@dataclass(frozen=True)
class APQViT(ScaleSearch):
    """Search scales by the error of what each block returns, where the answer depends on it most.

    A block, such as a layer of an encoder, is run with all that it rounds, and each scale in turn
    takes the factor of its range that loses least; so no block is worse by its metric than before.
    Errors are weighted with the answer's gradient (with random signs, as in PTQ4ViT: no labels),
    and those elements of which that is among the smallest `bottom` are left out. Rows of a weight
    take one factor. What softmax returns is rounded to unsigned codes from 0 to the end of its
    range, of which nothing is cut off: large probabilities, which attention lives by, lose no more
    than small ones, and steps are half as large as signed ones. Where that is worse for the block,
    it stays signed; with symmetric=False it is such a grid already. Products outside of blocks are
    searched as in PTQ4ViT, without twin ranges. See ScaleSearch for what is left alone.

    Args:
        bottom: the share of elements that does not count, from 0 to below 1; ours.
        candidates: factors of a range, each a run of the block over the samples.

    Raises:
        ValueError: as ScaleSearch, or no block has a product of attention that is rounded.

    Source: Ding et al., APQ-ViT, arXiv 2303.14341. The share and the search are not theirs: no code
    was published.
    """

    name: ClassVar[str] = "apq_vit"
    metric: str = "hessian"
    rounds: int = 2
    bottom: float = 0.5
    candidates: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.bottom < 1:
            raise ValueError(f"bottom must be from 0 to below 1, got {self.bottom}")

    def apply(self, model: nn.Module, scheme: Scheme, data: Data) -> None:
        with without_caches(model):  # a block that is run again would go on with its cache
            self._apply(model, data)

    def _apply(self, model: nn.Module, data: Data) -> None:
        few = replace(data, batches=list(first_batches(model, data, self.samples)))
        blocks, others = blocks_of(model, searched_in(model, few, self.name))
        if not blocks:
            raise ValueError(
                "apq_vit is for models of blocks in which products of attention are rounded: take "
                "a coverage such as linear, or another method, such as ptq4vit"
            )
        found = []
        metric = METRICS[self.metric]
        for done, block in enumerate(blocks):
            data.progress(self.name, done, len(blocks))
            (records,) = record(model, [block], few, metric.needs_gradient)
            _eliminate(records, self.bottom)
            search = BlockSearch(block, metric, self.factors)
            with evaluating(block.module):
                search.run(records, self.rounds, self._widen)
            found.append(search)
        data.progress(self.name, len(blocks), len(blocks))
        # all at the end: the passes are of the float model
        for one in (*found, *self.searches(model, others, few)):
            one.install()

    def _widen(self, activation: Activation) -> None:
        one = activation.original
        if not isinstance(one, ActivationQuantizer) or not one.calibrated or one.dynamic:
            return
        if one.kind == "probability" and one.symmetric:
            made = UnsignedQuantizer.after(one)
            made.set_bits(made.bits)
            activation.choices.append(made)
        elif one.kind != "probability":
            activation.widen(self.factors)


def _eliminate(records: Records, bottom: float) -> None:
    """Let the smallest gradients of each batch count for nothing."""
    for gradients in records.gradients.values():
        for i, gradient in enumerate(gradients):
            counted = records.counted[i]
            gradients[i] = without_bottom(gradient, bottom, counted)


def without_bottom(gradient: Tensor, bottom: float, counted: Tensor | None = None) -> Tensor:
    """Return a gradient whose smallest magnitudes, such a share of what counts, are 0."""
    sizes = gradient.abs()
    kept = sizes.flatten() if counted is None else sizes[counted.expand_as(sizes)]
    if (eliminated := int(bottom * kept.numel())) == 0:
        return gradient
    threshold = kept.float().kthvalue(eliminated).values
    return gradient.where(sizes > threshold, 0)
