"""The search: factors of products take, in turn, the scales that results are nearest with."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn

from ....batches import arguments_of
from ...functional.provenance import tensors_in
from ...quantizer import ActivationQuantizer
from ...running import Data, in_float
from ...scheme import Scheme
from ..bias_correction import correct_biases
from ..method import Rounding
from ..rounding.moments import groups_of
from .alternation import AttentionSearch, LinearSearch
from .metrics import METRICS, Metric
from .products import Attention, Linears, Searched, attentions_of, record
from .sources import sources_of

Kind = TypeVar("Kind", bound=Searched)
BYTES = 2**30  # of what one pass over the data records


@dataclass(frozen=True)
class ScaleSearch(Rounding):
    """Search the scales of weights and activations by what their products lose; round to nearest.

    Weight and input of each Linear or Conv1D, and both factors of attention's products, take turns:
    each takes the factor of its range that is best while the other is rounded as it was chosen
    last. The range as it is, is among them, so no product is worse by `metric` than before.
    Products are given what the float model gives them; what is no factor of one (residual sums,
    outputs, norms) keeps its range, and so do products of einsum that are no matrix product.
    Convolutions, embeddings, experts and tied weights are rounded to nearest, min-max.

    Args:
        metric: a name in METRICS of searching/metrics.py.
        low, high: the factors go from one to the other; candidates: how many are tried.
        rounds: of turns, at most; it ends where nothing changes.
        samples: of `data`, as many batches as hold these. Ranges are those of all data.

    Raises:
        ValueError: an option is unknown, no layer is reached, or the answer has no gradient.
    """

    metric: str = "mse"
    low: float = 0.5
    high: float = 1.2
    candidates: int = 100
    rounds: int = 3
    samples: int = 32
    corrects_biases: ClassVar[bool] = False  # as bias_correction does

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {self.metric!r}")
        if not 0 < self.low < self.high:
            raise ValueError(f"factors must go from above 0 to more, got {self.low} to {self.high}")
        if type(self.candidates) is not int or self.candidates < 2:
            raise ValueError(f"candidates must be a whole number from 2, got {self.candidates!r}")
        if self.rounds < 1 or self.samples < 1:
            raise ValueError(
                f"rounds and samples must be 1 or more, got {self.rounds} and {self.samples}"
            )

    @property
    def factors(self) -> list[float]:
        """The factors of ranges that are tried, beside 1."""
        return torch.linspace(self.low, self.high, self.candidates, dtype=torch.float64).tolist()

    def metric_of(self, searched: Searched) -> Metric:
        """Return the metric of a product."""
        return METRICS[self.metric]

    def twins_of(self, model: nn.Module, data: Data) -> Callable[[Searched], bool]:
        """Return what tells whether the first factor of a product may have twin ranges."""
        return lambda searched: False

    def apply(self, model: nn.Module, scheme: Scheme, data: Data) -> None:
        few = replace(data, batches=list(first_batches(model, data, self.samples)))
        searched = searched_in(model, few, self.name)
        found = self.searches(model, searched, few)

        def install() -> None:  # all at the end: the passes are of the float model
            for search in found:
                search.install()

        if self.corrects_biases:
            groups = [one.group for one in searched if isinstance(one, Linears)]
            correct_biases(model, groups, data, install, self.name)
        else:
            install()

    def searches(
        self, model: nn.Module, searched: Sequence[Searched], data: Data
    ) -> list[LinearSearch | AttentionSearch]:
        """Return the searches of products, which are done."""
        is_twin, norms = self.twins_of(model, data), sources_of(model, data, is_rounded_norm)
        found: list[LinearSearch | AttentionSearch] = []
        for chosen in passes_of(model, searched, data):
            needed = any(self.metric_of(one).needs_gradient for one in chosen)
            for one, records in zip(chosen, record(model, chosen, data, needed), strict=True):
                data.progress(self.name, len(found), len(searched))
                search = self._search(one, norms)
                search.run(records, self.rounds, is_twin(one))
                found.append(search)
        data.progress(self.name, len(found), len(searched))
        return found

    def _search(
        self, one: Searched, norms: Mapping[nn.Module, Any]
    ) -> LinearSearch | AttentionSearch:
        metric = self.metric_of(one)
        if isinstance(one, Attention):
            return AttentionSearch(one, metric, self.factors)
        before = norms[one.leader].output_quantizer if one.leader in norms else None
        return LinearSearch(one, metric, self.factors, before)


def searched_in(model: nn.Module, data: Data, what: str) -> list[Searched]:
    """Return the products of a quantized model whose factors are rounded."""
    with in_float(model):
        groups = groups_of(model, data, f"{what}: finding layers")
    searched: list[Searched] = [Linears(group) for group in groups]
    return searched + [one for one in attentions_of(model) if any(map(one.quantizer, (0, 1)))]


def is_rounded_norm(module: Any) -> bool:
    quantizer = getattr(module, "output_quantizer", None)
    is_constant = isinstance(quantizer, ActivationQuantizer) and not quantizer.dynamic
    return is_constant and isinstance(module, nn.LayerNorm)


def first_batches(model: nn.Module, data: Data, samples: int) -> Iterator[Any]:
    """Yield the first batches that hold so many samples."""
    held = 0
    for batch in data.batches:
        if held >= samples:
            return
        yield batch
        args, kwargs = arguments_of(batch, model)
        held += next(len(x) for x in tensors_in((args, kwargs)))


def passes_of(model: nn.Module, searched: Sequence[Kind], data: Data) -> Iterator[list[Kind]]:
    """Cut products into those whose records fit into BYTES."""
    first, *others = data.batches
    found = record(model, searched, replace(data, batches=[first]), False)
    chosen: list[Kind] = []
    held = 0
    for one, records in zip(searched, found, strict=True):
        if not records.is_product:
            continue  # its ranges stay
        size = records.bytes * (1 + len(others))
        if chosen and held + size > BYTES:
            yield chosen
            chosen, held = [], 0
        chosen.append(one)
        held += size
    yield chosen
