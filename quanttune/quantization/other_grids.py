"""Grids of activations that are more than one scale and integers: which there are, who refuses
them, and what a description says of them.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch import nn

from .channel_grids import (
    ChannelGroupQuantizer,
    ChannelShiftQuantizer,
    NoisyQuantizer,
    OutlierColumnQuantizer,
)
from .other_grid import OtherGrid, put
from .quantizer import ActivationQuantizer
from .value_grids import LogQuantizer, TwinQuantizer, UnsignedQuantizer

GRIDS: Mapping[str, type[OtherGrid]] = MappingProxyType(
    {
        grid.grid: grid
        for grid in (
            TwinQuantizer,
            LogQuantizer,
            ChannelShiftQuantizer,
            NoisyQuantizer,
            UnsignedQuantizer,
            ChannelGroupQuantizer,
            OutlierColumnQuantizer,
        )
    }
)


WITH_SCALES = (NoisyQuantizer, UnsignedQuantizer)  # one each, which can be learned


def refuse_other_grids(
    model: nn.Module, but: str, allowed: tuple[type[OtherGrid], ...] = ()
) -> None:
    """Raise a ValueError if a tensor of a model is rounded to one of these grids.

    but: what whoever calls does not do with them. allowed: those that it does it with.
    """
    for site, one in model.named_modules():
        if isinstance(one, OtherGrid) and not isinstance(one, allowed):
            raise ValueError(
                f"{one.made_by} rounds {site} to a {one.grid} grid, which needs {one.needs}: what "
                f"is called here {but}. Quantize the float model without {one.made_by}"
            )


def described_grids(sites: Mapping[str, ActivationQuantizer]) -> dict[str, dict[str, Any]]:
    """Return what a description says of each site with another grid."""
    return {
        site: {"grid": one.grid, "channels": getattr(one, "channels", 1)}
        for site, one in sites.items()
        if isinstance(one, OtherGrid)
    }


def add_described_grids(
    model: nn.Module, sites: Mapping[str, ActivationQuantizer], groups: Mapping[str, Any]
) -> None:
    """Give a model's sites the grids of a description, whose numbers are loaded later.

    Raises:
        ValueError: the model does not round such a site.
    """
    for group in groups.values():
        for site in group["targets"]:
            if site not in sites:
                raise ValueError(f"grid_groups: the model does not round {site!r}")
            one = sites[site]
            made = GRIDS[group["grid"]](one.bits, one.kind, one.scale.device, group["channels"])
            put(model, site, made)
