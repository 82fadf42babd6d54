"""Quantization-aware training with learned ranges, on the modules that `quantize` made."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import nn

from ..transaction import transaction
from .learning.lsq_plus import three_sigma_scale
from .modules import QuantizedEmbedding, holds
from .other_grids import WITH_SCALES, refuse_other_grids
from .quantizer import WeightQuantizer
from .row_quantizers import RowQuantizer
from .saving.hf_config import update_hf_config
from .state import quantizers, state_of, weight_quantizers


def learn_scales(model: nn.Module, how: str = "lsq") -> list[nn.Parameter]:
    """Learn the ranges of a calibrated model with its weights, in place; return the parameters.

    They start from what the calibration, and min-max of the weights, found. What an optimizer steps
    is the factor by which a scale differs from its start, since scales of one model differ by
    orders of magnitude and Adam moves each parameter by about its learning rate. Make the optimizer
    afterwards, without weight decay for them, and call `freeze_scales` at the end. Tables of
    embeddings keep the ranges of their rows, most of which a step does not see.

    Without this call a quantized model can be trained as well: then ranges of activations stay.

    Args:
        how: what is learned, and by which gradient.

            "lsq": the scales of activations and weights. The first step is that of the quantized
            model; zero points stay.

            "lsq+": for activations the offset too, by a parameter of its own, which is rounded to
            whole steps: integers with a zero point stay what they are. It needs symmetric=False,
            and starts where LSQ+ does if the calibrator was "omse", at the least squared error.
            Scales of weights are LSQ's, from max |mean +- 3 deviations|, unless a method chose
            them.

            "pact": the value at which activations are clipped, by the gradient of what is clipped
            alone; weight decay of these parameters is the paper's. Weights as "dorefa", as there.

            "dorefa": no scales. Weights go through a tanh, stretched to the largest magnitude they
            have now, and min-max grids follow; weights that are tied, or that something computes,
            are only followed. Ranges of activations stay.

    Raises:
        ValueError: the model is not quantized, is learning already, or has no scales since it is
            dynamic, or grids that are no scale and integers (ptq4vit, fq_vit); or `how` is unknown,
            or not for such grids.

    Source: Esser et al., LSQ, arXiv 1902.08153; Bhalgat et al., LSQ+, arXiv 2004.09576; Choi et
    al., PACT, arXiv 1805.06085; Zhou et al., DoReFa-Net, arXiv 1606.06160.
    """
    if how not in LEARNERS:
        raise ValueError(f"how must be one of {', '.join(LEARNERS)}, got {how!r}")
    if state_of(model).scheme.dynamic:
        raise ValueError("a dynamic model has no scales to learn: quantize it with data")
    refuse_other_grids(model, "learns no scale of it", WITH_SCALES)
    learner, sites = LEARNERS[how], quantizers(model)
    weights = _weights(model)
    for site, one in (*sites.items(), *((site, quantizer) for site, _, quantizer in weights)):
        if one.learned_by is not None:
            raise ValueError(
                f"{site} is learned by {one.learned_by} already: call freeze_scales(model) first"
            )
    learned: list[nn.Parameter] = []
    with _all_or_none(model):
        for quantizer in sites.values():
            if quantizer.calibrated and learner.activations is not None:
                learned += quantizer.learn(learner.activations)
        owners = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
        for site, holder, weight_quantizer in weights:
            if learner.weights is not _squash or _is_alone(holder, owners):
                learned += learner.weights(site, holder, weight_quantizer)
    return learned


def freeze_scales(model: nn.Module) -> None:
    """Make learned ranges constants, in place: the model is what `quantize` returns, with them.

    Weights that were squashed become what they were squashed to.

    Raises:
        ValueError: the model is not quantized.
    """
    state_of(model)
    with _all_or_none(model):
        for quantizer in quantizers(model).values():
            quantizer.stop_learning()
        for holder, weight_quantizer in weight_quantizers(model).values():
            if weight_quantizer.top is not None:
                holder.weight.data = weight_quantizer.squashed(holder.weight.detach())
            weight_quantizer.stop_learning()


def _weights(model: nn.Module) -> list[tuple[str, Any, WeightQuantizer]]:
    """Return the weights that learn: all but tables."""
    return [
        (site, holder, quantizer)
        for site, (holder, quantizer) in weight_quantizers(model).items()
        if not isinstance(holder, QuantizedEmbedding)
    ]


def _scale(_: str, holder: Any, quantizer: WeightQuantizer) -> list[nn.Parameter]:
    return [quantizer.learn(quantizer.scale_of(holder.weight))]


def _three_sigma(site: str, holder: Any, quantizer: WeightQuantizer) -> list[nn.Parameter]:
    if quantizer.scale is not None:
        return _scale(site, holder, quantizer)
    rows = holder.weight
    rows = quantizer.rows(rows) if isinstance(quantizer, RowQuantizer) else rows
    return [quantizer.learn(three_sigma_scale(rows, quantizer.bits, quantizer.axis))]


def _squash(site: str, holder: Any, quantizer: WeightQuantizer) -> list[nn.Parameter]:
    if quantizer.scale is not None:
        raise ValueError(
            f"a method chose the codes of {site}, and a tanh would change them: quantize without "
            'it, or learn how="lsq"'
        )
    quantizer.squash(holder.weight)
    return []


def _is_alone(holder: Any, owners: Mapping[int, int]) -> bool:
    """Tell whether a weight is a parameter of its holder, and of nothing else."""
    is_kept = not isinstance(holder, nn.Module) or holds(holder)
    return is_kept and owners[id(holder.weight)] == 1


class Learner(NamedTuple):
    """What learns ranges: of activations, by a name that `learn` takes, and of weights."""

    activations: str | None
    weights: Callable[[str, Any, WeightQuantizer], list[nn.Parameter]]


LEARNERS: Mapping[str, Learner] = MappingProxyType(
    {
        "lsq": Learner("lsq", _scale),
        "lsq+": Learner("lsq+", _three_sigma),
        "pact": Learner("pact", _squash),
        "dorefa": Learner(None, _squash),
    }
)


@contextmanager
def _all_or_none(model: nn.Module) -> Iterator[None]:
    """Change the ranges of a model, and its configuration; all of them, or none."""
    with transaction(model, partial(update_hf_config, model)) as undo:
        for holder, quantizer in weight_quantizers(model).values():
            if quantizer.top is not None:
                undo.callback(setattr, holder.weight, "data", holder.weight.data)
        yield
        update_hf_config(model)
