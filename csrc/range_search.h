#pragma once

#include <cstdint>

#include "simd.h"

namespace quanttune {

// errors[k] = sum over x (size) of (x - step * clamp(rint(x / step), qmin, qmax))^2 for steps[k]; 0 lies in
// [qmin, qmax]. See reference.range_search.
void quantization_errors(const void* x, const float* steps, double* errors, Type type,
                         std::int64_t size, std::int64_t candidates, int qmin, int qmax,
                         int threads);

// counts[i] = how many |x| lie in [i * width, (i + 1) * width); what lies beyond counts in the last one. See
// reference.range_search.
void magnitude_histogram(const void* x, std::int64_t* counts, Type type, std::int64_t size,
                         float width, std::int64_t bins, int threads);

}  // namespace quanttune
