"""Rotation of a float model that is not quantized yet: to be tuned, say, or saved as it is."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from ..masks import Mask
from ..transaction import transaction
from .methods import Rotate
from .placement import check_devices
from .running import Data
from .scheme import Scheme
from .state import refuse_quantized
from .ties import snapshot


def rotate(
    model: nn.Module,
    data: Iterable[Any],
    *,
    seed: int = 0,
    mask: Mask | None = "attention_mask",
) -> nn.Module:
    """Do what the method "rotate" of `quantize` does, in place, and return the float model.

    It computes what it did, and is of the same modules, except that what was tied is not.

    Args:
        model: a float model of pre-norm blocks.
        data: batches of inputs, of which the first is run: it tells what reads and writes what.
        seed: of the random signs.
        mask: which tokens are padding, as in `attach`.

    Raises:
        ValueError: the model has no residual stream that can be rotated; it says what is in the
            way. The model is left as it was.
    """
    refuse_quantized(model)
    check_devices(model)
    with transaction(model) as undo:
        undo.callback(snapshot(model))
        Rotate(seed).apply(model, Scheme(8), Data(data, mask))
    return model
