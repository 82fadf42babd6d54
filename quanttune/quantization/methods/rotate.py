"""Rotations of the residual stream and of values, folded into the weights around them."""

import warnings
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..running import Data, evaluating, main_output
from ..scheme import Scheme
from ..ties import untie
from ..token_mask import counting, without_padding
from .equalizing.readers import watched
from .method import Equalization
from .rotating.folding import rotate_stream, rotate_values
from .rotating.plan import Stream, Values, streams, values
from .rotating.spaces import Watch


@dataclass(frozen=True)
class Rotate(Equalization):
    """Multiply the residual stream, and each head's values, with an orthogonal matrix.

    An outlier's channel is spread over all of them. The matrices go into the weights that write and
    read; norms lose their gains to their readers, and no operation is added. A head that is tied to
    the embeddings gets a weight of its own. For LayerNorms the matrix keeps the mean, so that they
    stay what they are. Inputs behind an activation function keep their outliers.

    Args:
        seed: of the random signs.

    Source: Ashkboos et al., QuaRot, arXiv 2404.00456, and Liu et al., SpinQuant, arXiv 2405.16406:
    what of them needs no rotation while the model runs.
    """

    name: ClassVar[str] = "rotate"
    seed: int = 0

    @torch.no_grad()
    def apply(self, model: nn.Module, scheme: Scheme, data: Data) -> None:
        first = Data(list(islice(data.batches, 1)), data.mask)  # the same one each time
        watch = watched(model, first, Watch(model))
        found, refused = streams(watch)
        some = [f"that of {name}: {why}" for name, why in refused.items()][:3]
        reasons = "; ".join(some) + ("; ..." if len(refused) > 3 else "")
        if not found:
            raise ValueError(
                f"{type(model).__name__} has no residual stream that can be rotated: "
                f"{reasons or 'no norm reads a sum of what modules write'}"
            )
        if refused:
            warnings.warn(f"some streams are not rotated: {reasons}", stacklevel=3)
        heads = values(watch)
        before = _output(model, first)
        untie(model, _modules(found, heads))
        for i, stream in enumerate(found):
            rotate_stream(stream, self.seed + i)
        for i, part in enumerate(heads):
            rotate_values(part, self.seed + i)
        _check(before, _output(model, first))


def _modules(found: list[Stream], heads: list[Values]) -> list[Any]:
    """Return the modules whose parameters are changed."""
    modules: list[Any] = []
    for stream in found:
        modules += [*stream.writers, *stream.readers]
        for norm, readers in stream.norms.items():
            modules += [norm.module, *readers]
    for part in heads:
        modules += [part.writer, *part.readers]
    return [module for module in dict.fromkeys(modules) if isinstance(module, nn.Module)]


def _output(model: nn.Module, data: Data) -> Tensor:
    (batch,) = data.batches
    with evaluating(model), counting(model, batch, data.mask) as (args, kwargs):
        return without_padding(main_output(model(*args, **kwargs)), "output")


def _check(before: Tensor, after: Tensor) -> None:
    """Refuse a model that computes something else: it does what was not foreseen."""
    error = ((after.double() - before.double()).norm() / before.double().norm()).item()
    # norms compute in float32, whatever the model does
    limit = max(torch.finfo(before.dtype).eps, torch.finfo(torch.float32).eps) ** 0.5
    if not error <= limit:
        raise ValueError(
            f"rotating changed what the model computes by {error:.1e} of its norm, where rounding "
            f"explains {limit:.1e}: its modules do what is not understood. Leave out rotate"
        )
