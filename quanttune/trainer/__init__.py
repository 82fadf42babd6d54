"""Outlier-driven tuning inside the training loops of other libraries, each of which is optional."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .lightning_callback import QuantTuneCallback as QuantTuneCallback
    from .timm_task import QuantTuneTask as QuantTuneTask
    from .timm_task import QuantTuneTaskMixin as QuantTuneTaskMixin
    from .transformers_trainer import QuantTuneMixin as QuantTuneMixin
    from .transformers_trainer import QuantTuneTrainer as QuantTuneTrainer

# where each name is, and the extra that brings its library
_HOMES = {
    "QuantTuneTrainer": ("transformers_trainer", "trainer"),
    "QuantTuneMixin": ("transformers_trainer", "trainer"),
    "QuantTuneCallback": ("lightning_callback", "lightning"),
    "QuantTuneTask": ("timm_task", "vision"),
    "QuantTuneTaskMixin": ("timm_task", "vision"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, extra = _HOMES[name]
    try:
        return getattr(import_module(f".{module}", __name__), name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f'{error}: pip install "quanttune[{extra}]"') from error


def __dir__() -> list[str]:
    return sorted(_HOMES)
