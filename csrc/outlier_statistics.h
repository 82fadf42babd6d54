#pragma once

#include <cstdint>

#include "simd.h"

namespace quanttune {

// Per row of x (rows, size): maximum, median, mean, deviation, ratio, maximum_count, median_count, into
// `statistics` (rows, 7), float64 if x is, else float32. See reference.outlier_statistics.
void outlier_statistics(const void* x, void* statistics, Type type, std::int64_t rows,
                        std::int64_t size, bool exact, int threads);

// grad_x = grad + d sum(ratio_grad * ratio) / dx; grad_x may be grad. `ratio_grad` (rows) has the type of
// `statistics`. See reference.outlier_statistics_backward.
void outlier_statistics_backward(const void* grad, const void* x, const void* statistics,
                                 const void* ratio_grad, void* grad_x, Type type,
                                 std::int64_t rows, std::int64_t size, bool exact,
                                 bool detach_deviation, int threads);

}  // namespace quanttune
