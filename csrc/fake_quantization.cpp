#include "fake_quantization.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <vector>

#include "codes.h"
#include "parallel.h"

namespace quanttune {

namespace {

constexpr std::int64_t kChunk = 1 << 15;  // elements of a task: below this, waking a thread costs more

QUANTTUNE_INLINE Floats snap(Floats x, Floats step, Bounds bounds) {
  return code_of(x, step, bounds) * step;
}

QUANTTUNE_INLINE Masks is_inside(Floats x, Floats step, Bounds bounds) {
  // one code beyond each bound still rounds exactly, and tells "outside" from "at the bound"
  const Floats code = code_of(x, step, Bounds{bounds.low - 1, bounds.high + 1});
  return (code >= bounds.low) & (code <= bounds.high);
}

template <class Vector>
QUANTTUNE_INLINE Vector snap_any(Vector x, Floats step, Bounds bounds) {
  return convert<Vector>(snap(convert<Floats>(x), step, bounds));
}

// A run shares one step, or (PER_LANE) has one step per element.
template <class T, bool PER_LANE>
QUANTTUNE_CLONES void quantize_run(const T* x, T* y, const float* scale, std::int64_t size,
                                   Bounds bounds) {
  std::int64_t start = 0;
  if (!PER_LANE) {
    const Floats step = splat(*scale);
    for (; start + 2 * kLanes <= size; start += 2 * kLanes) {
      prefetch_page_ahead(x + start);
      const Pair<T> pair = load_pair(x + start);
      store_mapped_pair(y + start, Pair<T>{snap_any(pair.first, step, bounds),
                                           snap_any(pair.second, step, bounds)});
    }
  }
  for_lanes(size - start, [&](std::int64_t offset, std::int64_t count) QUANTTUNE_BODY {
    const std::int64_t i = start + offset;
    T values[kLanes] = {};
    Floats step = splat(PER_LANE ? 1.0f : *scale);
    std::memcpy(values, x + i, count * sizeof(T));
    if (PER_LANE) std::memcpy(&step, scale + i, count * sizeof(float));
    store(values, snap_any(load(values), step, bounds));
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
    const Masks inside = is_inside(convert<Floats>(load(values)), step, bounds);
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

void check_scale(const Grid& grid) {
  for (std::int64_t channel = 0; channel < grid.channels; ++channel) {
    const float step = grid.scale[channel];
    if (std::isfinite(step) && step > 0) continue;
    std::ostringstream message;
    message << "scale must be finite and positive, got " << (std::isnan(step) ? NAN : step);
    throw std::invalid_argument(message.str());
  }
}

// ------------------------------------------------------------------------------- dynamic ranges

// Magnitudes are compared as bits: those of NaN are above all others.
template <class T>
using Bits = decltype(magnitude_bits(typename Traits<T>::Vector{}));
template <class T>
using Word = std::decay_t<decltype(Bits<T>{}[0])>;

template <class T>
QUANTTUNE_INLINE Bits<T> magnitudes(const T* x, std::int64_t count) {
  T values[kLanes] = {};
  std::memcpy(values, x, count * sizeof(T));
  return magnitude_bits(load(values));
}

template <class T>
QUANTTUNE_CLONES Word<T> max_magnitude(const T* x, std::int64_t size) {
  Bits<T> first{}, second{};
  std::int64_t i = 0;
  for (; i + 2 * kLanes <= size; i += 2 * kLanes) {
    const Pair<T> pair = load_pair(x + i);
    const Bits<T> a = magnitude_bits(pair.first), b = magnitude_bits(pair.second);
    first = a > first ? a : first;
    second = b > second ? b : second;
  }
  for_lanes(size - i, [&](std::int64_t offset, std::int64_t count) QUANTTUNE_BODY {
    const Bits<T> a = magnitudes(x + i + offset, count);
    first = a > first ? a : first;
  });
  first = first > second ? first : second;
  Word<T> most = first[0];
  for (int lane = 1; lane < kLanes; ++lane) most = std::max<Word<T>>(most, first[lane]);
  return most;
}

// Raises `most`, one per channel, to the magnitudes of a row of channels.
template <class T>
QUANTTUNE_CLONES void raise_to(const T* x, Word<T>* most, std::int64_t channels) {
  for_lanes(channels, [&](std::int64_t i, std::int64_t count) QUANTTUNE_BODY {
    Bits<T> seen{};
    std::memcpy(&seen, most + i, count * sizeof(Word<T>));
    const Bits<T> bits = magnitudes(x + i, count);
    seen = bits > seen ? bits : seen;
    std::memcpy(most + i, &seen, count * sizeof(Word<T>));
  });
}

template <class T>
std::vector<Word<T>> absmax_of_channels(const T* x, const Grid& grid, int threads) {
  std::vector<Word<T>> most(grid.channels, 0);
  const std::int64_t size = grid.outer * grid.channels * grid.inner;
  if (size < 2 * kChunk) threads = 1;
  if (grid.channels == 1) {
    std::vector<Word<T>> parts((size + kChunk - 1) / kChunk, 0);
    parallel_for(parts.size(), threads, [&](std::int64_t part) {
      parts[part] = max_magnitude(x + part * kChunk, std::min(kChunk, size - part * kChunk));
    });
    for (Word<T> part : parts) most[0] = std::max(most[0], part);
  } else if (grid.inner == 1) {
    for (std::int64_t row = 0; row < grid.outer; ++row)
      raise_to(x + row * grid.channels, most.data(), grid.channels);
  } else {
    parallel_for(grid.channels, threads, [&](std::int64_t channel) {
      for (std::int64_t row = 0; row < grid.outer; ++row) {
        const T* run = x + (row * grid.channels + channel) * grid.inner;
        most[channel] = std::max(most[channel], max_magnitude(run, grid.inner));
      }
    });
  }
  return most;
}

// As reference.scale_of.
template <class Scalar>
float scale_of(Scalar absmax, int qmax) {
  if (absmax == 0) return 1;
  const float step = float(absmax) / float(qmax);
  return step < std::numeric_limits<float>::min() ? std::numeric_limits<float>::min() : step;
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
  check_scale(grid);
  dispatch(type, [&](auto tag) {
    using T = decltype(tag);
    fake_quant_typed(static_cast<const T*>(x), static_cast<T*>(y), grid, threads);
  });
}

void dynamic_fake_quant(const void* x, void* y, Type type, const Grid& grid, int threads) {
  dispatch(type, [&](auto tag) {
    using T = decltype(tag);
    const auto absmax = absmax_of_channels(static_cast<const T*>(x), grid, threads);
    std::vector<float> scales;
    for (const auto bits : absmax)
      scales.push_back(scale_of(bit_cast<typename Traits<T>::Scalar>(bits), grid.qmax));
    Grid dynamic = grid;
    dynamic.scale = scales.data();
    fake_quant_typed(static_cast<const T*>(x), static_cast<T*>(y), dynamic, threads);
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
