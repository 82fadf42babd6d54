"""What a quantized model is: bits, granularity of weights, coverage, calibrator, exceptions."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import nn

from ..fake_quantizer import integer_range
from . import coverage as coverages
from .affine_quantizer import AffineQuantizer
from .calibrators import AFFINE, CALIBRATORS, Calibrator, make_calibrator
from .quantizer import ActivationQuantizer, WeightQuantizer
from .row_quantizers import GroupQuantizer

DYNAMIC = "dynamic"  # no calibration: the range of each activation is taken from itself
Overrides = Mapping[str, Mapping[str, int] | None]


@dataclass(frozen=True)
class Scheme:
    """Uniform quantization of weights and activations; see `quantize`."""

    bits: int = 8
    weight_bits: int | None = None  # those of activations
    calibrator: str | Callable[[], Calibrator] = "minmax"
    coverage: str = "full_no_softmax"
    weights: str | int = "channel"
    residual: bool = True
    overrides: Overrides = field(default_factory=dict)
    symmetric: bool = True  # activations; weights always are
    methods: Sequence[str] = ()  # what changed the parameters
    range_gradient: bool = False  # of grids that follow what they round, while that is trained

    def __post_init__(self) -> None:
        integer_range(self.bits)
        integer_range(self._weight_bits)
        coverages.kinds_of(self.coverage, self.residual)
        names = (*CALIBRATORS, DYNAMIC)
        if isinstance(self.calibrator, str) and self.calibrator not in names:
            raise ValueError(
                f"calibrator must be one of {', '.join(names)}, or a function that makes one, "
                f"got {self.calibrator!r}"
            )
        if isinstance(self.calibrator, str) and not (self.symmetric or self.calibrator in AFFINE):
            raise ValueError(
                f"calibrator {self.calibrator!r} has no affine form: with symmetric=False it must "
                f"be one of {', '.join(AFFINE)}, or a function that makes one that has range()"
            )
        is_size = type(self.weights) is int and self.weights > 1
        if not is_size and self.weights not in ("channel", "tensor"):
            raise ValueError(
                f'weights must be "channel", "tensor" or the size of groups, such as 128, got '
                f"{self.weights!r}"
            )
        for pattern, override in self.overrides.items():
            if override is not None and set(override) != {"bits"}:
                raise ValueError(
                    f'overrides must map patterns to {{"bits": ...}} or None, got {pattern!r}: '
                    f"{override!r}"
                )
            if override:
                integer_range(override["bits"])

    @property
    def kinds(self) -> frozenset[str]:
        """The kinds of activations that are quantized."""
        return coverages.kinds_of(self.coverage, self.residual)

    @property
    def dynamic(self) -> bool:
        return self.calibrator == DYNAMIC

    @property
    def _weight_bits(self) -> int:
        return self.bits if self.weight_bits is None else self.weight_bits

    def activation_quantizer(
        self, site: str, kind: str | None, device: torch.device
    ) -> ActivationQuantizer | nn.Identity:
        """Make what the activation of a site goes through, ready to calibrate."""
        bits = self._bits_of(site, self.bits)
        if kind is None or kind not in self.kinds or bits is None:
            return nn.Identity()
        calibrator = None
        if not self.dynamic:
            calibrator = make_calibrator(self.calibrator, bits, self.symmetric)
        grid = ActivationQuantizer if self.symmetric else AffineQuantizer
        quantizer = grid(bits, kind, calibrator, device)
        quantizer.range_gradient = self.range_gradient
        quantizer.observer = self.calibrator if isinstance(self.calibrator, str) else None
        return quantizer

    def weight_quantizer(
        self, site: str, output_axis: int, inputs: int | None = None
    ) -> WeightQuantizer | nn.Identity:
        """Make what a weight goes through whose output channels lie along `output_axis`.

        inputs: of a matrix that a Linear or Conv1D multiplies with; others have no groups.

        Raises:
            ValueError: groups of the size that `weights` is do not fit into the inputs.
        """
        bits = self._bits_of(site, self._weight_bits)
        if bits is None:
            return nn.Identity()
        if isinstance(self.weights, int) and inputs is not None:
            _check_groups(site, inputs, self.weights)
            quantizer: WeightQuantizer = GroupQuantizer(bits, output_axis, self.weights)
        else:
            quantizer = WeightQuantizer(bits, None if self.weights == "tensor" else output_axis)
        quantizer.range_gradient = self.range_gradient
        return quantizer

    def _bits_of(self, site: str, bits: int) -> int | None:
        """Return the width that the last pattern says that matches a quantizer or its module."""
        for pattern, override in reversed(list(self.overrides.items())):
            if matches(pattern, site):
                return None if override is None else override["bits"]
        return bits


def _check_groups(site: str, inputs: int, size: int) -> None:
    if inputs % size:
        fitting = [n for n in (256, 192, 128, 96, 64, 48, 32, 16) if inputs % n == 0]
        owner = site.rpartition(".")[0]
        raise ValueError(
            f"{site}: {inputs} inputs do not make groups of {size}; groups of "
            f"{', '.join(map(str, fitting)) or inputs} would fit. Give weights such a size, or "
            f"leave the weight in float, by overrides={{{owner!r}: None}}"
        )


def matches(pattern: str, site: str) -> bool:
    """Tell whether a pattern names a quantizer, or the module that it belongs to."""
    return fnmatchcase(site, pattern) or fnmatchcase(site.rpartition(".")[0], pattern)
