"""Post-training quantization for Vision Transformers: correlations, and the order of scores."""

from dataclasses import dataclass
from typing import ClassVar

from .searching.metrics import Metric, ranking
from .searching.products import Attention, Searched
from .searching.scale_search import ScaleSearch


@dataclass(frozen=True)
class Ranking(ScaleSearch):
    """Search scales by Pearson's correlation, those of scores by their order too; correct biases.

    See ScaleSearch for what it leaves alone and the other options; published were 1000 samples.
    Correlation does not see a common factor of all errors, so ranges stay within `low` and `high`,
    and the mean error of what a Linear returns goes into its bias, as bias_correction does it. The
    paper's widths, which differ from layer to layer, are `quanttune.allocate_bits`.

    Args:
        weight, margin: of the penalty for pairs of keys whose scores change their order.
        pairs: of keys that are compared for each query, drawn once.

    Source: Liu et al., Post-Training Quantization for Vision Transformer, arXiv 2106.14156.
    """

    name: ClassVar[str] = "ranking"
    corrects_biases: ClassVar[bool] = True
    metric: str = "pearson"
    rounds: int = 20
    weight: float = 0.1
    margin: float = 0.2
    pairs: int = 64

    def metric_of(self, searched: Searched) -> Metric:
        if isinstance(searched, Attention) and searched.is_score:
            return ranking(self.weight, self.margin, self.pairs)
        return super().metric_of(searched)
