"""The columns of the statistics, as constants that a kernel can read."""

import triton.language as tl

from quanttune import reference

COLUMNS = tl.constexpr(reference.COLUMNS)
MAXIMUM = tl.constexpr(reference.MAXIMUM)
MEDIAN = tl.constexpr(reference.MEDIAN)
MEAN = tl.constexpr(reference.MEAN)
DEVIATION = tl.constexpr(reference.DEVIATION)
RATIO = tl.constexpr(reference.RATIO)
MAXIMUM_COUNT = tl.constexpr(reference.MAXIMUM_COUNT)
MEDIAN_COUNT = tl.constexpr(reference.MEDIAN_COUNT)
