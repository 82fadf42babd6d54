#pragma once

#include <cstdint>

#include "simd.h"

namespace quanttune {

// The columns of `statistics`; the reference has the same.
enum Column { kMaximum, kMedian, kMean, kDeviation, kRatio, kMaximumCount, kMedianCount };
constexpr int kColumns = 7;
constexpr std::int64_t kSerial = 1 << 15;  // elements up to which waking threads costs more

// The part of a row that counts, in elements; the rest is padding.
struct Range {
  std::int64_t begin, size;
};

// The statistics of each row of x (rows, size), into (rows, kColumns), float64 if x is, else float32.
// `ranges` (rows) may be null: whole rows. See reference.outlier_statistics.
void outlier_statistics(const void* x, void* statistics, Type type, std::int64_t rows,
                        std::int64_t size, bool exact, const Range* ranges, int threads);

// grad_x = grad + d sum(ratio_grad * ratio) / dx; grad_x may be grad. `ratio_grad` (rows) has the type of
// `statistics`. See reference.outlier_statistics_backward.
void outlier_statistics_backward(const void* grad, const void* x, const void* statistics,
                                 const void* ratio_grad, void* grad_x, Type type,
                                 std::int64_t rows, std::int64_t size, bool exact,
                                 bool detach_deviation, const Range* ranges, int threads);

}  // namespace quanttune
