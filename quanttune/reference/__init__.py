"""Every op of quanttune in plain PyTorch: the definition, the fallback and the oracle.

The C++ (csrc/, through cpu.py) and Triton (triton_kernels/) kernels have functions of the same
names, with the same signatures, and return the same bits for codes, maxima and medians. Symbols: A
is the activation of one sample, flattened over tokens and channels; N is its number of elements; s
is a quantization step.

`observe`, `outlier_ratio` and `FusedObserver` mirror `quanttune.fused_observer` on autograd alone,
so that `from quanttune.reference import observe` is all it takes to compare the two.
"""

from .fake_quantization import absmax as absmax
from .fake_quantization import dynamic_fake_quant as dynamic_fake_quant
from .fake_quantization import dynamic_fake_quant_backward as dynamic_fake_quant_backward
from .fake_quantization import fake_quant as fake_quant
from .fake_quantization import fake_quant_backward as fake_quant_backward
from .fake_quantization import learned_fake_quant_backward as learned_fake_quant_backward
from .fake_quantization import round_again as round_again
from .fake_quantization import scale_of as scale_of
from .fused_observer import FusedObserver as FusedObserver
from .fused_observer import Statistics as Statistics
from .fused_observer import observe as observe
from .fused_observer import outlier_ratio as outlier_ratio
from .fused_observer import rows_of as rows_of
from .outlier_statistics import COLUMNS as COLUMNS
from .outlier_statistics import DEVIATION as DEVIATION
from .outlier_statistics import MAXIMUM as MAXIMUM
from .outlier_statistics import MAXIMUM_COUNT as MAXIMUM_COUNT
from .outlier_statistics import MEAN as MEAN
from .outlier_statistics import MEDIAN as MEDIAN
from .outlier_statistics import MEDIAN_COUNT as MEDIAN_COUNT
from .outlier_statistics import RATIO as RATIO
from .outlier_statistics import SAMPLE_SIZE as SAMPLE_SIZE
from .outlier_statistics import accumulator_dtype as accumulator_dtype
from .outlier_statistics import outlier_statistics as outlier_statistics
from .outlier_statistics import outlier_statistics_backward as outlier_statistics_backward
from .outlier_statistics import result_dtype as result_dtype
from .outlier_statistics import sample_positions as sample_positions
from .outlier_statistics import sample_stride as sample_stride
