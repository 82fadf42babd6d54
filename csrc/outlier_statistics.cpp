#include "outlier_statistics.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "parallel.h"
#include "sampling.h"

namespace quanttune {

namespace {

// The geometry depends on the row's size alone, so any number of threads gives the same bits.
constexpr std::int64_t kChunk = 1 << 14;  // elements of a task
constexpr std::int64_t kBlock = 512;      // elements between two looks at the running maximum
constexpr std::int64_t kPivot = 256;      // elements whose mean shifts the sums of a chunk
constexpr std::int64_t kSerial = 1 << 15;
constexpr int kColumns = 7;
enum Column { kMaximum, kMedian, kMean, kDeviation, kRatio, kMaximumCount, kMedianCount };

// What one chunk of a row knows.
struct Partial {
  double mean, squares;  // squares: sum of (x - mean)^2
  double maximum;
  std::int64_t maximum_count;
};

template <class Vector>
QUANTTUNE_INLINE double sum_of(const Vector& lanes) {
  double sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
  return sum;
}

// One block: adds its shifted sums, returns its maximum. NaN and inf show in the sums.
template <class T>
QUANTTUNE_INLINE typename Traits<T>::Scalar accumulate(const T* x, std::int64_t size, double pivot,
                                                       Doubles& sum, Doubles& squares) {
  using Vector = typename Traits<T>::Vector;
  using Scalar = typename Traits<T>::Scalar;
  const Doubles shift = splat(pivot);
  Vector maxima{};
  std::int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    const Vector value = load(x + i);
    const Vector absolute = magnitude(value);
    maxima = absolute > maxima ? absolute : maxima;
    const Doubles shifted = to_doubles(value) - shift;
    sum += shifted;
    squares += shifted * shifted;
  }
  if (i < size) {
    T rest[kLanes] = {};
    std::memcpy(rest, x + i, (size - i) * sizeof(T));
    const Vector value = load(rest);
    const Vector absolute = magnitude(value);
    maxima = absolute > maxima ? absolute : maxima;
    Doubles shifted = to_doubles(value) - shift;
    for (std::int64_t lane = size - i; lane < kLanes; ++lane) shifted[lane] = 0;
    sum += shifted;
    squares += shifted * shifted;
  }
  Scalar maximum = 0;
  for (int lane = 0; lane < kLanes; ++lane) maximum = std::max(maximum, Scalar(maxima[lane]));
  return maximum;
}

template <class T, class Scalar>
QUANTTUNE_INLINE std::int64_t count_equal(const T* x, std::int64_t size, Scalar wanted) {
  std::int64_t count = 0;
  for_lanes(size, [&](std::int64_t i, std::int64_t length) QUANTTUNE_BODY {
    T values[kLanes] = {};
    std::memcpy(values, x + i, length * sizeof(T));
    const auto absolute = magnitude(load(values));
    for (std::int64_t lane = 0; lane < length; ++lane) count += absolute[lane] == wanted;
  });
  return count;
}

template <class T>
QUANTTUNE_CLONES Partial summarize(const T* x, std::int64_t size) {
  Doubles sum{}, squares{};
  const std::int64_t head = std::min(size, kPivot);
  accumulate(x, head, 0.0, sum, squares);
  const double pivot = sum_of(sum) / double(head);
  sum = squares = Doubles{};
  Partial partial{0, 0, -1, 0};
  for (std::int64_t at = 0; at < size; at += kBlock) {
    const std::int64_t length = std::min(kBlock, size - at);
    const auto maximum = accumulate(x + at, length, pivot, sum, squares);
    if (maximum < partial.maximum) continue;
    const std::int64_t count = count_equal(x + at, length, maximum);
    partial.maximum_count = (maximum > partial.maximum ? 0 : partial.maximum_count) + count;
    partial.maximum = maximum;
  }
  const double total = sum_of(sum);
  partial.mean = pivot + total / double(size);
  partial.squares = sum_of(squares) - total * (total / double(size));
  return partial;
}

// ------------------------------------------------------------------------------- the median

// Rows above kSampleSize keep the bits of their sample here, from the main pass to the selection.
template <class Bits>
Bits* sample_buffer(std::int64_t size) {
  static thread_local std::vector<Bits> buffer;
  if (std::int64_t(buffer.size()) < size) buffer.resize(size);
  return buffer.data();
}

template <class Bits>
struct Selected {
  Bits bits;
  std::int64_t count;
};

// The element of 0-based rank `rank` among the magnitudes, and how many equal it: one counting pass over
// the leading bits, then a selection within the bucket that holds it.
template <class Bits>
Selected<Bits> select(const Bits* data, std::int64_t size, std::int64_t rank) {
  constexpr Bits kMagnitude = std::numeric_limits<Bits>::max() >> 1;
  constexpr int kBuckets = 2048;
  constexpr int kShift = sizeof(Bits) * 8 - 12;  // 11 bits below the sign
  static thread_local std::vector<Bits> bucket;
  std::uint32_t even[kBuckets] = {}, odd[kBuckets] = {};  // two, so that equal keys do not wait
  for (std::int64_t i = 0; i + 1 < size; i += 2) {
    ++even[(data[i] & kMagnitude) >> kShift];
    ++odd[(data[i + 1] & kMagnitude) >> kShift];
  }
  if (size % 2) ++even[(data[size - 1] & kMagnitude) >> kShift];
  int key = 0;
  while (rank >= std::int64_t(even[key]) + odd[key]) {
    rank -= std::int64_t(even[key]) + odd[key];
    ++key;
  }
  bucket.clear();
  for (std::int64_t i = 0; i < size; ++i) {
    const Bits bits = data[i] & kMagnitude;
    if (int(bits >> kShift) == key) bucket.push_back(bits);
  }
  std::nth_element(bucket.begin(), bucket.begin() + rank, bucket.end());
  const Bits found = bucket[rank];
  return {found, std::count(bucket.begin(), bucket.end(), found)};
}

double to_double(float value) { return value; }
double to_double(double value) { return value; }
double to_double(Float16 value) {
  Float16 lanes[kLanes] = {value};
  return load(lanes)[0];
}
double to_double(BFloat16 value) {
  BFloat16 lanes[kLanes] = {value};
  return load(lanes)[0];
}

// ------------------------------------------------------------------------------------ a row

Partial merge(const Partial* partials, std::int64_t chunks, std::int64_t size) {
  Partial row{0, 0, 0, 0};
  const auto length = [&](std::int64_t chunk) {
    return double(std::min(kChunk, size - chunk * kChunk));
  };
  // by way of the first mean, so that the mean of a constant is that constant exactly
  for (std::int64_t i = 0; i < chunks; ++i)
    row.mean += (partials[i].mean - partials[0].mean) * length(i);
  row.mean = partials[0].mean + row.mean / double(size);
  for (std::int64_t i = 0; i < chunks; ++i) {
    const Partial& part = partials[i];
    const double distance = part.mean - row.mean;
    row.squares += part.squares + length(i) * distance * distance;
    if (part.maximum < row.maximum) continue;
    row.maximum_count = (part.maximum > row.maximum ? 0 : row.maximum_count) + part.maximum_count;
    row.maximum = part.maximum;
  }
  return row;
}

template <class T, class Result>
void write_row(const Partial& row, T median, std::int64_t median_count, std::int64_t size,
               Result* out) {
  const double middle = to_double(median);
  const double deviation =
      std::sqrt(std::max(row.squares, 0.0) / double(std::max<std::int64_t>(size - 1, 1)));
  // max(NaN, 0) is NaN in this order of arguments; infinities make the sums NaN or inf
  if (!std::isfinite(deviation) || std::isnan(row.squares)) {
    std::fill(out, out + kColumns, std::numeric_limits<Result>::quiet_NaN());
    return;
  }
  out[kMaximum] = Result(row.maximum);
  out[kMedian] = Result(middle);
  out[kMean] = Result(row.mean);
  out[kDeviation] = Result(deviation);
  out[kRatio] = Result(deviation == 0 ? 0 : (row.maximum - middle) / deviation);
  out[kMaximumCount] = Result(row.maximum_count);
  out[kMedianCount] = Result(median_count);
}

template <class T>
void statistics_typed(const T* x, typename Traits<T>::Scalar* statistics, std::int64_t rows,
                      std::int64_t size, bool exact, int threads) {
  using Bits = typename Traits<T>::Bits;
  const Sample sample(size, exact);
  const std::int64_t chunks = (size + kChunk - 1) / kChunk;
  if (rows * size < kSerial) threads = 1;
  std::vector<Partial> partials(rows * chunks);
  Bits* gathered = sample.is_whole_row() ? nullptr : sample_buffer<Bits>(rows * sample.count());

  parallel_for(rows * chunks, threads, [&](std::int64_t task) {
    const std::int64_t row = task / chunks, begin = (task % chunks) * kChunk;
    const std::int64_t end = std::min(begin + kChunk, size);
    const T* values = x + row * size;
    partials[task] = summarize(values + begin, end - begin);
    if (!gathered) return;
    Bits* sampled = gathered + row * sample.count();
    sample.for_positions(begin, end, [&](std::int64_t stratum, std::int64_t position) {
      sampled[stratum] = bit_cast<Bits>(values[position]);
    });
  });

  parallel_for(rows, threads, [&](std::int64_t row) {
    const Bits* sampled = gathered ? gathered + row * sample.count()
                                   : reinterpret_cast<const Bits*>(x + row * size);
    const auto median = select(sampled, sample.count(), (sample.count() - 1) / 2);
    write_row(merge(&partials[row * chunks], chunks, size), bit_cast<T>(median.bits),
              median.count, size, statistics + row * kColumns);
  });
}

// ------------------------------------------------------------------------------ the gradient

// d(ratio_grad * ratio)/da = slope (a - mean) +- at_maximum -+ at_median, for one row.
template <class Scalar>
struct RowGradient {
  bool live;
  Scalar mean, slope, maximum, at_maximum, median, at_median;

  RowGradient(const Scalar* statistics, Scalar ratio_grad, std::int64_t size, bool detach) {
    const Scalar deviation = statistics[kDeviation];
    live = deviation != 0 && ratio_grad != 0;
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

// `whole`: every element counts for the median, else only the sampled ones, which come afterwards.
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

template <class T>
QUANTTUNE_CLONES void backward_chunk(const T* grad, const T* x, T* grad_x, std::int64_t size,
                                     const RowGradient<typename Traits<T>::Scalar>& row,
                                     bool whole) {
  for_lanes(size, [&](std::int64_t i, std::int64_t count) QUANTTUNE_BODY {
    if (count == kLanes) {
      store(grad_x + i, add_gradient(load(grad + i), load(x + i), row, whole));
      return;
    }
    T upstream[kLanes] = {}, values[kLanes] = {};
    std::memcpy(upstream, grad + i, count * sizeof(T));
    std::memcpy(values, x + i, count * sizeof(T));
    store(upstream, add_gradient(load(upstream), load(values), row, whole));
    std::memcpy(grad_x + i, upstream, count * sizeof(T));
  });
}

template <class T>
void backward_typed(const T* grad, const T* x, const typename Traits<T>::Scalar* statistics,
                    const typename Traits<T>::Scalar* ratio_grad, T* grad_x, std::int64_t rows,
                    std::int64_t size, bool exact, bool detach, int threads) {
  using Scalar = typename Traits<T>::Scalar;
  const Sample sample(size, exact);
  const bool whole = sample.is_whole_row();
  const std::int64_t chunks = (size + kChunk - 1) / kChunk;
  if (rows * size < kSerial) threads = 1;
  parallel_for(rows * chunks, threads, [&](std::int64_t task) {
    const std::int64_t row = task / chunks, begin = (task % chunks) * kChunk;
    const std::int64_t end = std::min(begin + kChunk, size);
    const T *g = grad + row * size, *values = x + row * size;
    T* out = grad_x + row * size;
    const RowGradient<Scalar> gradient(statistics + row * kColumns, ratio_grad[row], size, detach);
    if (!gradient.live) {
      if (g != out) std::memcpy(out + begin, g + begin, (end - begin) * sizeof(T));
      return;
    }
    if (whole) {
      backward_chunk(g + begin, values + begin, out + begin, end - begin, gradient, true);
      return;
    }
    // the few sampled elements at the median: taken aside before g may be overwritten
    static thread_local std::vector<std::pair<std::int64_t, T>> at_median;
    at_median.clear();
    sample.for_positions(begin, end, [&](std::int64_t, std::int64_t position) {
      if (std::abs(to_double(values[position])) == double(gradient.median))
        at_median.emplace_back(position, g[position]);
    });
    backward_chunk(g + begin, values + begin, out + begin, end - begin, gradient, false);
    for (const auto& [position, upstream] : at_median)
      backward_chunk(&upstream, values + position, out + position, 1, gradient, true);
  });
}

}  // namespace

void outlier_statistics(const void* x, void* statistics, Type type, std::int64_t rows,
                        std::int64_t size, bool exact, int threads) {
  dispatch(type, [&](auto tag) {
    using T = decltype(tag);
    statistics_typed(static_cast<const T*>(x),
                     static_cast<typename Traits<T>::Scalar*>(statistics), rows, size, exact,
                     threads);
  });
}

void outlier_statistics_backward(const void* grad, const void* x, const void* statistics,
                                 const void* ratio_grad, void* grad_x, Type type,
                                 std::int64_t rows, std::int64_t size, bool exact,
                                 bool detach_deviation, int threads) {
  dispatch(type, [&](auto tag) {
    using T = decltype(tag);
    using Scalar = typename Traits<T>::Scalar;
    backward_typed(static_cast<const T*>(grad), static_cast<const T*>(x),
                   static_cast<const Scalar*>(statistics), static_cast<const Scalar*>(ratio_grad),
                   static_cast<T*>(grad_x), rows, size, exact, detach_deviation, threads);
  });
}

}  // namespace quanttune
