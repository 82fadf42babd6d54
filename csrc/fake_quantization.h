#pragma once

#include <cstdint>

#include "simd.h"

namespace quanttune {

// A tensor seen as (outer, channels, inner), with one step per channel; (1, 1, size) has one step.
struct Grid {
  const float* scale;
  std::int64_t outer, channels, inner;
  int qmin, qmax;
};

// y = clamp(rint(x / scale), qmin, qmax) * scale; y may be x. See reference.fake_quant. Throws
// std::invalid_argument if a step is not finite and positive.
void fake_quant(const void* x, void* y, Type type, const Grid& grid, int threads);

// The same with the steps that put the largest magnitude of each channel on qmax; grid.scale is not read. See
// reference.dynamic_fake_quant.
void dynamic_fake_quant(const void* x, void* y, Type type, const Grid& grid, int threads);

// grad_x = grad where qmin <= rint(x / scale) <= qmax, else 0; grad_x may be grad.
void fake_quant_backward(const void* grad, const void* x, void* grad_x, Type type,
                         const Grid& grid, int threads);

// The same, and for each channel the sum of grad * dy/dstep in grad_scale. See
// reference.learned_fake_quant_backward.
void learned_fake_quant_backward(const void* grad, const void* x, void* grad_x, float* grad_scale,
                                 Type type, const Grid& grid, int threads);

// grad, and what the first of the largest magnitudes of each channel gets by way of the step that it spans;
// grid.scale is not read. See reference.dynamic_fake_quant_backward.
void dynamic_fake_quant_backward(const void* grad, const void* x, void* grad_x, Type type,
                                 const Grid& grid, int threads);

// What a backward needs of a tensor on one grid that was not kept: y = fake_quant(x), and grad, over which is
// written what fake_quant_backward makes of it. Returns, with `slope`, the sum of grad * dy/dstep. Where
// grid.scale is null the grid is that of the largest magnitude, and grad gets what that does. See
// reference.round_again.
double round_again(void* grad, const void* x, void* y, Type type, bool slope, const Grid& grid,
                   int threads);

}  // namespace quanttune
