#include <algorithm>
#include <utility>
#include <vector>

#include "outlier_statistics.h"
#include "parallel.h"
#include "sampling.h"

namespace quanttune {

namespace {

// d(ratio_grad * ratio)/da = slope (a - mean) +- at_maximum -+ at_median, for one row.
template <class Scalar>
struct RowGradient {
  // The gradient divides by its square, which below would be no normal number.
  static constexpr Scalar kLeastDeviation = sizeof(Scalar) == 8 ? Scalar(0x1p-511) : Scalar(0x1p-63);
  bool live;
  Scalar mean, slope, maximum, at_maximum, median, at_median;

  RowGradient(const Scalar* statistics, Scalar ratio_grad, std::int64_t size, bool detach) {
    const Scalar deviation = statistics[kDeviation];
    live = !(deviation < kLeastDeviation) && ratio_grad != 0;  // NaN stays NaN
    const Scalar unit = ratio_grad / (live ? deviation : 1);
    const Scalar freedom = Scalar(std::max<std::int64_t>(size - 1, 1));
    mean = statistics[kMean];
    slope = detach ? 0 : -unit * statistics[kRatio] / ((live ? deviation : 1) * freedom);
    maximum = statistics[kMaximum];
    at_maximum = unit / statistics[kMaximumCount];
    median = statistics[kMedian];
    at_median = unit / statistics[kMedianCount];
  }
};

template <class Vector, class Scalar>
QUANTTUNE_INLINE Vector add_gradient(Vector grad, Vector x, const RowGradient<Scalar>& row,
                                     bool whole) {
  const Vector absolute = magnitude(x), zero{};
  const auto negative = x < zero;
  Vector added = row.slope * (x - row.mean);
  const Vector peak = splat(row.at_maximum), middle = splat(row.at_median);
  added += absolute == row.maximum ? (negative ? -peak : peak) : zero;
  if (whole) {
    const Vector signed_middle = negative ? -middle : (x > zero ? middle : zero);
    added -= absolute == row.median ? signed_middle : zero;
  }
  return grad + added;
}

// One piece of a row. `whole`: every element that equals the median counts as it.
template <class T>
QUANTTUNE_CLONES void add_piece(const T* grad, const T* x, T* grad_x, std::int64_t size,
                                const RowGradient<typename Traits<T>::Scalar>& row, bool whole) {
  std::int64_t i = 0;
  for (; i + 2 * kLanes <= size; i += 2 * kLanes) {
    prefetch_page_ahead(x + i);
    prefetch_page_ahead(grad + i);
    const Pair<T> upstream = load_pair(grad + i), values = load_pair(x + i);
    store_pair(grad_x + i, Pair<T>{add_gradient(upstream.first, values.first, row, whole),
                                   add_gradient(upstream.second, values.second, row, whole)});
  }
  for_lanes(size - i, [&](std::int64_t offset, std::int64_t count) QUANTTUNE_BODY {
    T upstream[kLanes] = {}, values[kLanes] = {};
    std::memcpy(upstream, grad + i + offset, count * sizeof(T));
    std::memcpy(values, x + i + offset, count * sizeof(T));
    store(upstream, add_gradient(load(upstream), load(values), row, whole));
    std::memcpy(grad_x + i + offset, upstream, count * sizeof(T));
  });
}

template <class T>
using Aside = std::vector<std::pair<std::int64_t, T>>;  // positions, and what came in there

// The elements of a piece that are both sampled and at the median: few, taken aside before what came in may
// be overwritten.
template <class T>
QUANTTUNE_CLONES void take_aside(const T* grad, const T* x, std::int64_t begin,
                                 const Geometry& geometry, const Sample& sample,
                                 typename Traits<T>::Bits median, Aside<T>& aside) {
  using Bits = typename Traits<T>::Bits;
  constexpr Bits kMagnitude = Bits(-1) >> 1;
  sample.for_piece(geometry, begin, [&](std::int64_t position) QUANTTUNE_BODY {
    if ((bit_cast<Bits>(x[position]) & kMagnitude) == median)
      aside.emplace_back(position, grad[position]);
  });
}

template <class T>
void add_sampled(const T* grad, const T* x, T* grad_x, std::int64_t begin, std::int64_t end,
                 const Geometry& geometry, const Sample& sample,
                 const RowGradient<typename Traits<T>::Scalar>& row) {
  static thread_local Aside<T> aside;
  aside.clear();
  // a median of zero has no sign, and no gradient
  if (row.median != 0) take_aside(grad, x, begin, geometry, sample, bits_of<T>(row.median), aside);
  add_piece(grad + begin, x + begin, grad_x + begin, end - begin, row, false);
  for (const auto& [position, upstream] : aside)
    add_piece(&upstream, x + position, grad_x + position, 1, row, true);
}

template <class T>
void copy(const T* from, T* to, std::int64_t size) {
  if (from != to) std::memcpy(to, from, size * sizeof(T));
}

template <class T>
void backward_typed(const T* grad, const T* x, const typename Traits<T>::Scalar* statistics,
                    const typename Traits<T>::Scalar* ratio_grad, T* grad_x, std::int64_t rows,
                    std::int64_t size, bool exact, bool detach, const Range* ranges, int threads) {
  using Scalar = typename Traits<T>::Scalar;
  const Geometry whole(size, exact);
  const Sample* sample = Sample::of(whole);
  if (rows * size < kSerial) threads = 1;
  parallel_for(rows * whole.chunks, threads, [&](std::int64_t task) {
    const std::int64_t row = task / whole.chunks, chunk = task % whole.chunks;
    const Range range = ranges ? ranges[row] : Range{0, size};
    const std::int64_t first = row * size + range.begin, rest = range.begin + range.size;
    if (chunk == 0) {  // padding
      copy(grad + row * size, grad_x + row * size, range.begin);
      copy(grad + row * size + rest, grad_x + row * size + rest, size - rest);
    }
    const Geometry geometry = whole.part(range.size);
    const std::int64_t start = chunk * whole.chunk, stop = std::min(start + whole.chunk, range.size);
    const T *upstream = grad + first, *values = x + first;
    T* out = grad_x + first;
    const RowGradient<Scalar> gradient(statistics + row * kColumns, ratio_grad[row], range.size, detach);
    for (std::int64_t begin = start; begin < stop; begin += whole.piece) {
      const std::int64_t end = std::min(begin + whole.piece, stop);
      if (!gradient.live) {
        copy(upstream + begin, out + begin, end - begin);
      } else if (sample) {
        add_sampled(upstream, values, out, begin, end, geometry, *sample, gradient);
      } else {
        add_piece(upstream + begin, values + begin, out + begin, end - begin, gradient, true);
      }
    }
  });
}

}  // namespace

void outlier_statistics_backward(const void* grad, const void* x, const void* statistics,
                                 const void* ratio_grad, void* grad_x, Type type,
                                 std::int64_t rows, std::int64_t size, bool exact,
                                 bool detach_deviation, const Range* ranges, int threads) {
  dispatch(type, [&](auto tag) {
    using T = decltype(tag);
    using Scalar = typename Traits<T>::Scalar;
    backward_typed(static_cast<const T*>(grad), static_cast<const T*>(x),
                   static_cast<const Scalar*>(statistics), static_cast<const Scalar*>(ratio_grad),
                   static_cast<T*>(grad_x), rows, size, exact, detach_deviation,
                   ranges, threads);
  });
}

}  // namespace quanttune
