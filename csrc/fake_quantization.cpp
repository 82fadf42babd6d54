#include "fake_quantization.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <type_traits>
#include <vector>

#include "codes.h"
#include "parallel.h"

namespace quanttune {

namespace {

constexpr std::int64_t kChunk = 1 << 15;  // elements of a task: below this, waking a thread costs more
constexpr std::int64_t kBlock = 1024;     // elements that are summed in float32
constexpr std::int64_t kStrip = 256;      // channels of a task that sums over the rows of each

QUANTTUNE_INLINE Floats snap(Floats x, Floats step, Bounds bounds) {
  return code_of(x, step, bounds) * step;
}

QUANTTUNE_INLINE Masks is_inside(Floats x, Floats step, Bounds bounds) {
  // one code beyond each bound still rounds exactly, and tells "outside" from "at the bound"
  const Floats code = code_of(x, step, Bounds{bounds.low - 1, bounds.high + 1});
  return code == clamp(code, bounds.low, bounds.high);  // two comparisons and "and" take ten times as long
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

// The gradient where a code was inside, bit for bit, and else zero.
template <class T>
QUANTTUNE_INLINE void store_masked(T* to, const T* grad, Masks inside, std::int64_t count) {
  typedef std::make_signed_t<typename Traits<T>::Bits> Lanes
      __attribute__((vector_size(kLanes * sizeof(T))));
  Lanes bits{};
  std::memcpy(&bits, grad, count * sizeof(T));
  bits &= __builtin_convertvector(inside, Lanes);
  std::memcpy(to, &bits, count * sizeof(T));
}

template <class T, bool PER_LANE>
QUANTTUNE_CLONES void mask_run(const T* grad, const T* x, T* grad_x, const float* scale,
                               std::int64_t size, Bounds bounds) {
  for_lanes(size, [&](std::int64_t i, std::int64_t count) QUANTTUNE_BODY {
    Floats step = splat(PER_LANE ? 1.0f : *scale);
    if (PER_LANE) std::memcpy(&step, scale + i, count * sizeof(float));
    const Masks inside = is_inside(load_some(x + i, count), step, bounds);
    store_masked(grad_x + i, grad + i, inside, count);
  });
}

// A run of `slopes_of` below; it returns the sum, for one step. PER_LANE: adds to a sum per element.
template <class T, bool PER_LANE>
QUANTTUNE_CLONES double slope_run(const T* grad, const T* x, T* grad_x, const float* scale,
                                  double* sums, std::int64_t size, Bounds bounds) {
  double total = 0;
  for (std::int64_t start = 0; start < size; start += kBlock) {
    Floats sum{};
    for_lanes(std::min(kBlock, size - start), [&](std::int64_t offset, std::int64_t count)
                                                  QUANTTUNE_BODY {
      const std::int64_t i = start + offset;
      Floats step = splat(PER_LANE ? 1.0f : *scale);
      if (PER_LANE) std::memcpy(&step, scale + i, count * sizeof(float));
      const Floats steps = load_some(x + i, count) / step;
      const Floats code = round_half_even(clamp(steps, bounds.low - 1, bounds.high + 1));
      const Floats clipped = clamp(code, bounds.low, bounds.high);
      const Masks inside = code == clipped;
      const Floats part = load_some(grad + i, count) * (inside ? code - steps : clipped);
      store_masked(grad_x + i, grad + i, inside, count);
      if (PER_LANE) {
        Doubles seen{};
        std::memcpy(&seen, sums + i, count * sizeof(double));
        seen += convert<Doubles>(part);
        std::memcpy(sums + i, &seen, count * sizeof(double));
      } else {
        sum += part;
      }
    });
    total += sum_of(sum);
  }
  return total;
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
    prefetch_page_ahead(x + i);
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

// Of one channel it tells `chunk`, the first that holds it.
template <class T>
std::vector<Word<T>> absmax_of_channels(const T* x, const Grid& grid, int threads,
                                        std::int64_t* chunk = nullptr) {
  std::vector<Word<T>> most(grid.channels, 0);
  const std::int64_t size = grid.outer * grid.channels * grid.inner;
  if (size < 2 * kChunk) threads = 1;
  if (grid.channels == 1) {
    std::vector<Word<T>> parts((size + kChunk - 1) / kChunk, 0);
    parallel_for(parts.size(), threads, [&](std::int64_t part) {
      parts[part] = max_magnitude(x + part * kChunk, std::min(kChunk, size - part * kChunk));
    });
    const auto found = std::max_element(parts.begin(), parts.end());
    if (found != parts.end()) most[0] = *found;
    if (chunk) *chunk = found - parts.begin();
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
std::vector<float> scales_of(const std::vector<Word<T>>& most, int qmax) {
  std::vector<float> scales;
  for (const auto bits : most)
    scales.push_back(scale_of(bit_cast<typename Traits<T>::Scalar>(bits), qmax));
  return scales;
}

// Where the magnitude of each channel is found first; PER_LANE: a run has an element of each.
template <class T, bool PER_LANE>
QUANTTUNE_CLONES void find_places(const T* x, std::int64_t at, std::int64_t size,
                                  const Word<T>* most, std::int64_t* places) {
  if (!PER_LANE && *places >= 0) return;
  for (std::int64_t i = 0; i < size; i += kLanes) {
    const std::int64_t count = std::min(kLanes, size - i);
    const Bits<T> bits = magnitudes(x + at + i, count);
    Bits<T> wanted = Bits<T>{} + *most;
    if (PER_LANE) std::memcpy(&wanted, most + i, count * sizeof(Word<T>));
    const auto is = bits == wanted;
    bool any = false;
    for (int lane = 0; lane < kLanes; ++lane) any |= is[lane] != 0;
    if (!any) continue;
    for (std::int64_t lane = 0; lane < count; ++lane) {
      std::int64_t& place = places[PER_LANE ? i + lane : 0];
      if (is[lane] && place < 0) place = at + i + lane;
    }
    if (!PER_LANE && *places >= 0) return;
  }
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

// Sums, for each channel, grad times dy/dstep: the code less x / step, and where that was clipped the code.
// grad_x is masked as by fake_quant_backward.
template <class T>
std::vector<double> slopes_of(const T* grad, const T* x, T* grad_x, const Grid& grid,
                              int threads) {
  const Bounds bounds{float(grid.qmin), float(grid.qmax)};
  std::vector<double> sums(grid.channels, 0);
  const std::int64_t size = grid.outer * grid.channels * grid.inner;
  if (grid.inner == 1 && grid.channels > 1) {
    if (size < kChunk) threads = 1;
    parallel_for((grid.channels + kStrip - 1) / kStrip, threads, [&](std::int64_t strip) {
      const std::int64_t first = strip * kStrip;
      const std::int64_t width = std::min(kStrip, grid.channels - first);
      for (std::int64_t at = first; at < size; at += grid.channels)
        slope_run<T, true>(grad + at, x + at, grad_x + at, grid.scale + first, &sums[first], width,
                           bounds);
    });
    return sums;
  }
  // as for_runs cuts it
  const std::int64_t pieces = (grid.inner + kChunk - 1) / kChunk;
  std::vector<double> parts(grid.outer * grid.channels * pieces, 0);
  for_runs(grid, false, threads, [&](std::int64_t at, const float* scale, std::int64_t length) {
    const std::int64_t part = at / grid.inner * pieces + at % grid.inner / kChunk;
    parts[part] = slope_run<T, false>(grad + at, x + at, grad_x + at, scale, nullptr, length,
                                      bounds);
  });
  for (std::size_t part = 0; part < parts.size(); ++part)
    sums[part / pieces % grid.channels] += parts[part];
  return sums;
}

// A run of `round_again`. Blocks in which a code was clipped are read again: mostly there are few.
template <class T, bool SLOPE>
QUANTTUNE_CLONES double again_run(T* grad, const T* x, T* y, float scale, std::int64_t size,
                                  Bounds bounds) {
  const Floats step = splat(scale);
  const Bounds beyond{bounds.low - 1, bounds.high + 1};
  double total = 0;
  for (std::int64_t start = 0; start < size; start += kBlock) {
    const std::int64_t length = std::min(kBlock, size - start);
    Floats sum{};
    Masks clips{};
    for_lanes(length, [&](std::int64_t offset, std::int64_t count) QUANTTUNE_BODY {
      const std::int64_t i = start + offset;
      prefetch_page_ahead(x + i);
      const Floats steps = load_some(x + i, count) / step;
      const Floats code = round_half_even(clamp(steps, beyond.low, beyond.high));
      const Floats clipped = clamp(code, bounds.low, bounds.high);
      clips |= code != clipped;
      T values[kLanes];
      store(values, convert<typename Traits<T>::Vector>(clipped * step));
      std::memcpy(y + i, values, count * sizeof(T));
      if (SLOPE)
        sum += load_some(grad + i, count) * (code == clipped ? code - steps : clipped);
    });
    if (SLOPE) total += sum_of(sum);
    int any = 0;
    for (int lane = 0; lane < kLanes; ++lane) any |= clips[lane];
    if (any) mask_run<T, false>(grad + start, x + start, grad + start, &scale, length, bounds);
  }
  return total;
}

template <class T>
double round_again_typed(T* grad, const T* x, T* y, bool slope, float scale, const Grid& grid,
                         int threads) {
  const Bounds bounds{float(grid.qmin), float(grid.qmax)};
  const auto run = slope ? again_run<T, true> : again_run<T, false>;
  std::vector<double> parts((grid.inner + kChunk - 1) / kChunk, 0);
  for_runs(grid, false, threads, [&](std::int64_t at, const float*, std::int64_t size) {
    parts[at / kChunk] = run(grad + at, x + at, y + at, scale, size, bounds);
  });
  double sum = 0;
  for (const double part : parts) sum += part;
  return sum;
}

template <class T>
std::vector<std::int64_t> places_of(const std::vector<Word<T>>& most, std::int64_t chunk,
                                    const T* x, const Grid& grid, int threads) {
  std::vector<std::int64_t> places(grid.channels, -1);
  if (grid.channels == 1) {
    const std::int64_t size = grid.outer * grid.inner, at = chunk * kChunk;
    find_places<T, false>(x, at, std::min(kChunk, size - at), most.data(), places.data());
    return places;
  }
  if (grid.outer * grid.channels * grid.inner < kChunk) threads = 1;
  parallel_for((grid.channels + kStrip - 1) / kStrip, threads, [&](std::int64_t strip) {
    const std::int64_t first = strip * kStrip;
    const std::int64_t end = std::min(grid.channels, first + kStrip);
    for (std::int64_t row = 0; row < grid.outer; ++row) {
      const std::int64_t at = row * grid.channels;
      if (grid.inner == 1) {
        find_places<T, true>(x, at + first, end - first, &most[first], &places[first]);
        continue;
      }
      for (std::int64_t channel = first; channel < end; ++channel)
        find_places<T, false>(x, (at + channel) * grid.inner, grid.inner, &most[channel],
                              &places[channel]);
    }
  });
  return places;
}

// Adds to grad what a channel's magnitude, at its place, gets by way of the step.
template <class T>
void add_slope(T* grad, const T* x, std::int64_t place, double sum, float scale) {
  if (place < 0) return;
  const double largest = to_double(x[place]);
  if (largest == 0) return;
  using Scalar = typename Traits<T>::Scalar;
  grad[place] = bit_cast<T>(bits_of<T>(Scalar(to_double(grad[place]) + sum * scale / largest)));
}

// As reference.dynamic_fake_quant_backward.
template <class T>
void dynamic_backward_typed(const T* grad, const T* x, T* grad_x, const Grid& shape, int threads) {
  std::int64_t chunk = 0;
  const auto most = absmax_of_channels(x, shape, threads, &chunk);
  const auto scales = scales_of<T>(most, shape.qmax);
  const auto places = places_of<T>(most, chunk, x, shape, threads);
  Grid grid = shape;
  grid.scale = scales.data();
  const auto sums = slopes_of(grad, x, grad_x, grid, threads);
  for (std::int64_t channel = 0; channel < grid.channels; ++channel)
    add_slope(grad_x, x, places[channel], sums[channel], scales[channel]);
}

template <class T>
double round_again_dynamic(T* grad, const T* x, T* y, bool slope, const Grid& grid, int threads) {
  std::int64_t chunk = 0;
  const auto most = absmax_of_channels(x, grid, threads, &chunk);
  const float scale = scales_of<T>(most, grid.qmax)[0];
  const double sum = round_again_typed(grad, x, y, slope, scale, grid, threads);
  if (slope) add_slope(grad, x, places_of<T>(most, chunk, x, grid, threads)[0], sum, scale);
  return sum;
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
    const auto scales = scales_of<T>(absmax, grid.qmax);
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

void learned_fake_quant_backward(const void* grad, const void* x, void* grad_x, float* grad_scale,
                                 Type type, const Grid& grid, int threads) {
  dispatch(type, [&](auto tag) {
    using T = decltype(tag);
    const auto sums = slopes_of(static_cast<const T*>(grad), static_cast<const T*>(x),
                                static_cast<T*>(grad_x), grid, threads);
    std::copy(sums.begin(), sums.end(), grad_scale);
  });
}

void dynamic_fake_quant_backward(const void* grad, const void* x, void* grad_x, Type type,
                                 const Grid& grid, int threads) {
  dispatch(type, [&](auto tag) {
    using T = decltype(tag);
    dynamic_backward_typed(static_cast<const T*>(grad), static_cast<const T*>(x),
                           static_cast<T*>(grad_x), grid, threads);
  });
}

double round_again(void* grad, const void* x, void* y, Type type, bool slope, const Grid& grid,
                   int threads) {
  double sum = 0;
  dispatch(type, [&](auto tag) {
    using T = decltype(tag);
    T* to = static_cast<T*>(grad);
    const T* from = static_cast<const T*>(x);
    sum = grid.scale ? round_again_typed(to, from, static_cast<T*>(y), slope, *grid.scale, grid,
                                         threads)
                     : round_again_dynamic(to, from, static_cast<T*>(y), slope, grid, threads);
  });
  return sum;
}

}  // namespace quanttune
