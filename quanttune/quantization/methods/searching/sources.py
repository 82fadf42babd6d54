"""Which module returned what a Linear is given."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from ...modules import QuantizedModule
from ...running import Data, forward_batches, in_float


def sources_of(
    model: nn.Module, data: Data, is_source: Callable[[nn.Module], bool]
) -> dict[nn.Module, nn.Module]:
    """Return the modules with weights that are given what a source returned, each with its source.

    What is computed of it on the way, a view apart, makes it another tensor.
    """
    kept: list[tuple[Tensor, nn.Module]] = []  # so that no later tensor lies where one of them did
    found: dict[nn.Module, nn.Module] = {}

    def keep(module: nn.Module, _: Any, output: Tensor) -> None:
        kept.append((output, module))

    def look(module: nn.Module, args: tuple[Any, ...]) -> None:
        at = args[0].data_ptr()
        for source in (source for x, source in kept if x.data_ptr() == at):
            found[module] = source

    with ExitStack() as undo, in_float(model):
        for module in model.modules():
            if isinstance(module, QuantizedModule):
                undo.callback(module.register_forward_pre_hook(look).remove)  # type: ignore[attr-defined]
            elif is_source(module):
                undo.callback(module.register_forward_hook(keep).remove)
        for batch in data.batches:
            forward_batches(model, [batch], data.mask)
            kept.clear()
    return found
