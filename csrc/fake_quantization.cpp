#include "fake_quantization.h"

#include <algorithm>

#include "parallel.h"

namespace quanttune {

namespace {

constexpr std::int64_t kChunk = 1 << 15;  // elements of a task: below this, waking a thread costs more

// Ties to even for |x| < 2^22: 1.5 * 2^23 leaves a float no fraction bits. The result is never -0.
QUANTTUNE_INLINE Floats round_half_even(Floats x) {
  const Floats to_integer = splat(12582912.0f);
  return (x + to_integer) - to_integer;
}

// NaN fails both comparisons, and stays.
QUANTTUNE_INLINE Floats clamp(Floats x, float low, float high) {
  x = x < low ? splat(low) : x;
  return x > high ? splat(high) : x;
}

struct Bounds {
  float low, high;
};

QUANTTUNE_INLINE Floats snap(Floats x, Floats step, Bounds bounds) {
  return round_half_even(clamp(x / step, bounds.low, bounds.high)) * step;
}

QUANTTUNE_INLINE Masks is_inside(Floats x, Floats step, Bounds bounds) {
  // one code beyond each bound still rounds exactly, and tells "outside" from "at the bound"
  const Floats code = round_half_even(clamp(x / step, bounds.low - 1, bounds.high + 1));
  return (code >= bounds.low) & (code <= bounds.high);
}

QUANTTUNE_INLINE void store_any(float* to, Floats value) { store(to, value); }
QUANTTUNE_INLINE void store_any(Float16* to, Floats value) { store(to, value); }
QUANTTUNE_INLINE void store_any(BFloat16* to, Floats value) { store(to, value); }
QUANTTUNE_INLINE void store_any(double* to, Floats value) { store(to, to_doubles(value)); }

// A run shares one step, or (PER_LANE) has one step per element.
template <class T, bool PER_LANE>
QUANTTUNE_CLONES void quantize_run(const T* x, T* y, const float* scale, std::int64_t size,
                                   Bounds bounds) {
  for_lanes(size, [&](std::int64_t i, std::int64_t count) QUANTTUNE_BODY {
    T values[kLanes] = {};
    Floats step = splat(PER_LANE ? 1.0f : *scale);
    if (count == kLanes) {
      if (PER_LANE) step = load(scale + i);
      store_any(y + i, snap(to_floats(load(x + i)), step, bounds));
      return;
    }
    std::memcpy(values, x + i, count * sizeof(T));
    if (PER_LANE) std::memcpy(&step, scale + i, count * sizeof(float));
    store_any(values, snap(to_floats(load(values)), step, bounds));
    std::memcpy(y + i, values, count * sizeof(T));
  });
}

template <class T, bool PER_LANE>
QUANTTUNE_CLONES void mask_run(const T* grad, const T* x, T* grad_x, const float* scale,
                               std::int64_t size, Bounds bounds) {
  using Bits = typename Traits<T>::Bits;
  for_lanes(size, [&](std::int64_t i, std::int64_t count) QUANTTUNE_BODY {
    T values[kLanes] = {};
    Floats step = splat(PER_LANE ? 1.0f : *scale);
    std::memcpy(values, x + i, count * sizeof(T));
    if (PER_LANE) std::memcpy(&step, scale + i, count * sizeof(float));
    const Masks inside = is_inside(to_floats(load(values)), step, bounds);
    Bits bits[kLanes] = {};
    std::memcpy(bits, grad + i, count * sizeof(T));
    for (int lane = 0; lane < kLanes; ++lane) bits[lane] = inside[lane] ? bits[lane] : Bits(0);
    std::memcpy(grad_x + i, bits, count * sizeof(T));
  });
}

// Calls body(offset, scale, size) for every piece of the tensor, in parallel.
template <class Body>
void for_runs(const Grid& grid, bool per_lane, int threads, Body body) {
  const std::int64_t runs = per_lane ? grid.outer : grid.outer * grid.channels;
  const std::int64_t length = per_lane ? grid.channels : grid.inner;
  const std::int64_t pieces = (length + kChunk - 1) / kChunk;
  if (runs * length < kChunk) threads = 1;
  parallel_for(runs * pieces, threads, [&](std::int64_t task) {
    const std::int64_t run = task / pieces;
    const std::int64_t start = (task % pieces) * kChunk;
    const float* scale = per_lane ? grid.scale + start : grid.scale + run % grid.channels;
    body(run * length + start, scale, std::min(kChunk, length - start));
  });
}

template <class T>
void fake_quant_typed(const T* x, T* y, const Grid& grid, int threads) {
  const Bounds bounds{float(grid.qmin), float(grid.qmax)};
  const bool per_lane = grid.inner == 1 && grid.channels > 1;
  const auto run = per_lane ? quantize_run<T, true> : quantize_run<T, false>;
  for_runs(grid, per_lane, threads, [&](std::int64_t at, const float* scale, std::int64_t size) {
    run(x + at, y + at, scale, size, bounds);
  });
}

template <class T>
void fake_quant_backward_typed(const T* grad, const T* x, T* grad_x, const Grid& grid,
                               int threads) {
  const Bounds bounds{float(grid.qmin), float(grid.qmax)};
  const bool per_lane = grid.inner == 1 && grid.channels > 1;
  const auto run = per_lane ? mask_run<T, true> : mask_run<T, false>;
  for_runs(grid, per_lane, threads, [&](std::int64_t at, const float* scale, std::int64_t size) {
    run(grad + at, x + at, grad_x + at, scale, size, bounds);
  });
}

}  // namespace

void fake_quant(const void* x, void* y, Type type, const Grid& grid, int threads) {
  dispatch(type, [&](auto tag) {
    using T = decltype(tag);
    fake_quant_typed(static_cast<const T*>(x), static_cast<T*>(y), grid, threads);
  });
}

void fake_quant_backward(const void* grad, const void* x, void* grad_x, Type type,
                         const Grid& grid, int threads) {
  dispatch(type, [&](auto tag) {
    using T = decltype(tag);
    fake_quant_backward_typed(static_cast<const T*>(grad), static_cast<const T*>(x),
                              static_cast<T*>(grad_x), grid, threads);
  });
}

}  // namespace quanttune
