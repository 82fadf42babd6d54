"""Triton kernels of quanttune, one file per op. Installed as `quanttune.triton_kernels`."""

from .fake_quantization import dynamic_fake_quant as dynamic_fake_quant
from .fake_quantization import fake_quant as fake_quant
from .fake_quantization import fake_quant_backward as fake_quant_backward
from .outlier_statistics import outlier_statistics as outlier_statistics
from .outlier_statistics_gradient import outlier_statistics_backward as outlier_statistics_backward
from .range_search import quantization_errors as quantization_errors
from .statistics_group import StatisticsGroup as StatisticsGroup
