"""From the activations of a site, batch by batch, to the range that its grid covers.

A calibrator is a class with `update(x)` and `absmax()`, a file per kind; a new one is a class in a
table. None keeps activations: what a site needs is bounded, however many batches it sees.
"""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

from .entropy import Entropy as Entropy
from .percentile import Percentile as Percentile
from .ranges import AffineCalibrator as AffineCalibrator
from .ranges import Calibrator as Calibrator
from .ranges import MinMax as MinMax
from .ranges import MovingAverage as MovingAverage
from .ranges import Range as Range
from .ranges import RangeCalibrator as RangeCalibrator
from .search import AffineOMSE as AffineOMSE
from .search import MeanSquaredError as MeanSquaredError
from .search import SymmetricOMSE as SymmetricOMSE

# what these cover depends on the data alone, so a range serves any number of bits
RANGES: Mapping[str, Callable[[], AffineCalibrator]] = MappingProxyType(
    {
        "minmax": MinMax,
        "ema": MovingAverage,
        "percentile": Percentile,
        "percentile_ema": partial(Percentile, 99.999, two_sided=True, sigma=0.01),
    }
)
# these search the best range of a grid of so many bits
SEARCHES: Mapping[str, Callable[[int], Calibrator]] = MappingProxyType(
    {"mse": MeanSquaredError, "omse": SymmetricOMSE, "kl": Entropy}
)
CALIBRATORS: Mapping[str, Callable[..., Calibrator]] = MappingProxyType({**RANGES, **SEARCHES})
# those that have an affine form: a percentile of magnitudes has one end, so it is that of values
AFFINE: Mapping[str, Callable[..., AffineCalibrator]] = MappingProxyType(
    {**RANGES, "percentile": partial(Percentile, two_sided=True), "omse": AffineOMSE}
)


def make_calibrator(
    kind: str | Callable[[], Calibrator], bits: int, symmetric: bool = True
) -> Calibrator:
    """Make the calibrator of one site, for a grid of `bits`.

    Args:
        kind: a name in CALIBRATORS, or if not `symmetric` in AFFINE, or a function that makes a
            calibrator, which then has to be `AffineCalibrator`.
    """
    if isinstance(kind, str):
        table = CALIBRATORS if symmetric else AFFINE
        return table[kind](bits) if kind in SEARCHES else table[kind]()
    calibrator = kind()
    if not (symmetric or isinstance(calibrator, AffineCalibrator)):
        raise TypeError(
            "symmetric=False needs a calibrator that has range() beside update() and absmax(), "
            f"got {type(calibrator).__name__}"
        )
    return calibrator
