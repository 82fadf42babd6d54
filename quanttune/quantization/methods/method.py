"""What a method is: a frozen dataclass of its options that changes a model in place."""

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import nn

from ..running import Data
from ..scheme import Scheme


class Method(ABC):
    """Changes a model so that rounding costs less; see Equalization, Regridding and Rounding."""

    name: ClassVar[str]
    reads_data: ClassVar[bool] = True

    @abstractmethod
    def apply(self, model: nn.Module, scheme: Scheme, data: Data) -> None:
        """Change a model in place; whoever calls takes the parameters back after an error.

        Args:
            model: float for an equalization; else calibrated, its weights not rounded.
            scheme: what the model is to be, or is, quantized to.
            data: what `quantize` was given.
        """


class Equalization(Method):
    """Changes the float model before it is quantized; what that computes stays the same."""


class Regridding(Method):
    """Gives activations of the calibrated model other grids than uniform ones, before weights are
    rounded; what that computes in float stays the same.
    """

    keeps_weights: ClassVar[bool] = (
        False  # in float beside the codes, so that nothing may round them
    )

    def check_constant_symmetric(self, scheme: Scheme) -> None:
        """Refuse a scheme whose activations have zero points, or no constant ranges."""
        if scheme.dynamic or not scheme.symmetric:
            raise ValueError(
                f"{self.name} needs constant symmetric grids: leave symmetric=True, and calibrator "
                'other than "dynamic"'
            )


class Rounding(Method):
    """Chooses the codes of weights, once the grids of activations are known.

    It leaves weights on their grid, whose constant `scale` it gives to the weight's quantizer.
    """
