"""What of a comparison is a problem, in sentences."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from ...quantization.state import quantizers
from .agreement import Layer
from .graph_cut import Rounding
from .result import Output

# how far an output may be off, in its largest value: computed from the same codes, and in
# the mean where no code is rounded before it
SAME_CODES = 1e-3
ROUNDING = 1e-5


def wrong_grids(sites: Sequence[Rounding], model: nn.Module) -> Iterator[str]:
    """Name the scales and zero points that are not the model's."""
    grids = quantizers(model)
    for site in sites:
        if site.site not in grids:
            raise ValueError(f"the file rounds at {site.site}, where the model has no site")
        quantizer = grids[site.site]
        scale, zero_point = quantizer.step.item(), site.center + quantizer.zero
        for found_scale, found_zero_point in dict.fromkeys(site.grids):
            if found_scale != scale:
                yield (
                    f"{site.site}: the scale is {found_scale:.8g} in the file, {scale:.8g} in the "
                    "model"
                )
            if found_zero_point != zero_point:
                yield (
                    f"{site.site}: the zero point is {found_zero_point} in the file, {zero_point} "
                    "in the model"
                )


def wrong_tensors(
    stored: Mapping[str, np.ndarray[Any, Any]], wanted: Mapping[str, Tensor]
) -> list[str]:
    """Name the stored tensors that are not the model's."""
    shared = [name for name in stored if name in wanted]
    wrong = [name for name in shared if not np.array_equal(stored[name], wanted[name].numpy())]
    if not wrong:
        return []
    return [
        f"{len(wrong)} of {len(shared)} tensors are not those of the model: {', '.join(wrong[:3])}"
    ]


def wrong_layers(layers: Sequence[Layer]) -> list[str]:
    """Name the first layer whose codes are others than the simulation's."""
    wrong = [layer for layer in layers if not layer.agrees]
    if not wrong:
        return []
    first = wrong[0]
    others = f"; so do {len(wrong) - 1} behind it" if wrong[1:] else ""
    return [
        f"{first.name} is the first layer that disagrees on the same codes before it: "
        f"{first.differ:.2%} of {first.values} codes differ, {first.beyond_one:.2%} by more than "
        f"1, the largest by {first.largest}{others}"
    ]


def wrong_output(output: Output) -> Iterator[str]:
    """Say of an output that it is off on the same codes, or farther off than noise would be."""
    same, most = output.same_codes.largest, SAME_CODES * output.magnitude
    if not same <= most:  # NaN is none
        yield (
            f"{output.name}: on the same codes before it it differs by {same:.3g}, and may by "
            f"{most:.3g}"
        )
    mean, allowed = output.file.mean, 2 * output.noise.mean + ROUNDING * output.magnitude
    if not mean <= allowed:
        yield (
            f"{output.name}: the file's is {mean:.3g} from the simulation's in the mean, more than "
            f"the {allowed:.3g} that noise would explain"
        )
