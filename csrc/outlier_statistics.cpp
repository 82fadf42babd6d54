#include "outlier_statistics.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <vector>

#include "memory.h"
#include "parallel.h"
#include "sampling.h"
#include "selection.h"

namespace quanttune {

namespace {

constexpr std::int64_t kBlock = 1024;  // elements whose sums are kept in the input's own precision
constexpr std::int64_t kProbes = 16;   // vectors of a chunk whose mean shifts its sums

// What one chunk of a row knows.
struct Partial {
  double pivot, offset;  // the mean is their sum, which would cost digits far from zero
  double squares;        // sum of (x - mean)^2
  double shifted;        // sum of (x - pivot)^2, from which `squares` was taken
  double maximum;
};

template <class Vector>
QUANTTUNE_INLINE double sum_of(const Vector& lanes) {
  double sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
  return sum;
}

// Sums of (x - pivot) and of its square, in the precision of Vector, and the bits of max|x|.
template <class Vector>
struct Sums {
  using Scalar = std::decay_t<decltype(Vector{}[0])>;
  using Bits = decltype(magnitude_bits(Vector{}));
  Doubles sum{}, squares{};
  Bits maximum{};

  // `size` is at most kBlock: in four streams a float lane adds about 16 numbers, which costs 8 roundings.
  template <class T>
  QUANTTUNE_INLINE void add_block(const T* x, std::int64_t size, Scalar pivot) {
    constexpr int kStreams = 4;
    Vector sums[kStreams] = {}, products[kStreams] = {};
    Bits peaks[kStreams] = {};
    const auto add = [&](int stream, Vector value) QUANTTUNE_BODY {
      const Vector shifted = value - pivot;
      const Bits bits = magnitude_bits(value);
      peaks[stream] = bits > peaks[stream] ? bits : peaks[stream];
      sums[stream] += shifted;
      products[stream] += shifted * shifted;
    };
    std::int64_t i = 0;
    for (; i + kStreams * kLanes <= size; i += kStreams * kLanes) {
      for (int line = 0; line < kStreams * kLanes * int(sizeof(T)); line += 64)
        prefetch(reinterpret_cast<const char*>(x + i) + line);
      for (int stream = 0; stream < kStreams; stream += 2) {
        const Pair<T> pair = load_pair(x + i + stream * kLanes);
        add(stream, convert<Vector>(pair.first));
        add(stream + 1, convert<Vector>(pair.second));
      }
    }
    for (; i + kLanes <= size; i += kLanes) add(0, convert<Vector>(load(x + i)));
    for (; i < size; ++i) {
      const auto value = Scalar(to_double(x[i]));
      const auto bits = magnitude_bits(splat(value))[0];
      sums[0][0] += value - pivot;
      products[0][0] += (value - pivot) * (value - pivot);
      peaks[0][0] = std::max<std::decay_t<decltype(bits)>>(bits, peaks[0][0]);
    }
    sum += convert<Doubles>((sums[0] + sums[1]) + (sums[2] + sums[3]));
    squares += convert<Doubles>((products[0] + products[1]) + (products[2] + products[3]));
    for (const Bits& peak : peaks) maximum = peak > maximum ? peak : maximum;
  }

  // after_piece(begin) finds the elements of that piece in a near cache
  template <class T, class Body>
  QUANTTUNE_INLINE static Partial of_chunk(const T* x, std::int64_t size, std::int64_t piece,
                                           Body after_piece) {
    Sums all;
    const Scalar pivot = mean_of_probes(x, size);
    for (std::int64_t begin = 0; begin < size; begin += piece) {
      const std::int64_t end = std::min(begin + piece, size);
      for (std::int64_t at = begin; at < end; at += kBlock)
        all.add_block(x + at, std::min(kBlock, end - at), pivot);
      after_piece(begin);
    }
    auto bits = all.maximum[0];
    for (int lane = 1; lane < kLanes; ++lane) bits = std::max<decltype(bits)>(bits, all.maximum[lane]);
    const double total = sum_of(all.sum), shifted = sum_of(all.squares);
    return {double(pivot), total / double(size), shifted - total * (total / double(size)), shifted,
            double(bit_cast<Scalar>(bits))};
  }

 private:
  template <class T>
  QUANTTUNE_INLINE static Scalar mean_of_probes(const T* x, std::int64_t size) {
    if (size < kProbes * kLanes) {
      Sums all;
      all.add_block(x, size, Scalar(0));
      return Scalar(sum_of(all.sum) / double(size));
    }
    Vector sum{};
    for (std::int64_t probe = 0; probe < kProbes; ++probe)
      sum += convert<Vector>(load(x + probe * (size / kProbes)));
    return Scalar(sum_of(convert<Doubles>(sum)) / double(kProbes * kLanes));
  }
};

// Summarizes chunk `index` of a row, and gathers its part of the sample if there is one.
template <class T>
QUANTTUNE_CLONES Partial summarize(const T* row, const Geometry& geometry, std::int64_t index,
                                   const SampleTable& table, typename Traits<T>::Bits* sampled) {
  using Bits = typename Traits<T>::Bits;
  const std::int64_t start = index * geometry.chunk, size = geometry.length(index);
  const auto gather = [&](std::int64_t begin) QUANTTUNE_BODY {
    if (!sampled) return;
    table.for_piece(start + begin, [&](std::int64_t stratum, std::int64_t position) QUANTTUNE_BODY {
      sampled[stratum] = bit_cast<Bits>(row[position]);
    });
  };
  const Partial partial =
      Sums<typename Traits<T>::Vector>::of_chunk(row + start, size, geometry.piece, gather);
  // Squares of floats can be too large or too small for a float, and a pivot far from the mean would cost
  // digits. NaN and inf go that way too.
  const bool fits = partial.maximum < 0x1p56 && partial.squares >= double(size) * 0x1p-100 &&
                    partial.squares >= 0.25 * partial.shifted;
  if (fits || partial.maximum == 0) return partial;
  return Sums<Doubles>::of_chunk(row + start, size, size, [](auto) QUANTTUNE_BODY {});
}

template <class T>
QUANTTUNE_CLONES std::int64_t count_magnitude(const T* x, std::int64_t size,
                                              typename Traits<T>::Scalar wanted) {
  std::int64_t count = 0;
  for (std::int64_t begin = 0; begin < size; begin += Geometry::kPiece) {
    decltype(load(x) == wanted) equal{};  // minus one per hit
    for_lanes(std::min(Geometry::kPiece, size - begin), [&](std::int64_t i, std::int64_t length)
                                                            QUANTTUNE_BODY {
      T values[kLanes] = {};
      std::memcpy(values, x + begin + i, length * sizeof(T));
      auto hits = magnitude(load(values)) == wanted;
      for (std::int64_t lane = length; lane < kLanes; ++lane) hits[lane] = 0;
      equal += hits;
    });
    for (int lane = 0; lane < kLanes; ++lane) count -= equal[lane];
  }
  return count;
}

// The whole row, with the pivot of its first chunk.
Partial merge(const Partial* partials, const Geometry& row) {
  Partial merged{};
  merged.pivot = partials[0].pivot;
  const auto distance = [&](const Partial& part) {
    return (part.pivot - merged.pivot) + (part.offset - merged.offset);
  };
  double total = 0;
  for (std::int64_t i = 0; i < row.chunks; ++i)
    total += distance(partials[i]) * double(row.length(i));
  merged.offset = total / double(row.size);
  for (std::int64_t i = 0; i < row.chunks; ++i) {
    const double apart = distance(partials[i]);
    merged.squares += partials[i].squares + double(row.length(i)) * apart * apart;
    merged.maximum = std::max(merged.maximum, partials[i].maximum);
  }
  return merged;
}

template <class T, class Result>
void finish_row(const T* x, const Partial* partials, const Geometry& row,
                const typename Traits<T>::Bits* sampled, Result* out) {
  const Partial merged = merge(partials, row);
  const double freedom = double(std::max<std::int64_t>(row.size - 1, 1));
  // max(NaN, 0) is NaN in this order of arguments; infinities make the sums NaN or inf
  const double deviation = std::sqrt(std::max(merged.squares, 0.0) / freedom);
  if (!std::isfinite(deviation)) {
    std::fill(out, out + kColumns, std::numeric_limits<Result>::quiet_NaN());
    return;
  }
  std::int64_t count = 0;
  for (std::int64_t i = 0; i < row.chunks; ++i)
    if (partials[i].maximum == merged.maximum)
      count += count_magnitude(x + i * row.chunk, row.length(i), Result(merged.maximum));
  const auto median = select_magnitude(sampled, row.samples, (row.samples - 1) / 2);
  const double middle = to_double(bit_cast<T>(median.bits));
  out[kMaximum] = Result(merged.maximum);
  out[kMedian] = Result(middle);
  out[kMean] = Result(merged.pivot + merged.offset);
  out[kDeviation] = Result(deviation);
  out[kRatio] = Result(deviation == 0 ? 0 : (merged.maximum - middle) / deviation);
  out[kMaximumCount] = Result(count);
  out[kMedianCount] = Result(median.count);
}

template <class T>
void statistics_typed(const T* x, typename Traits<T>::Scalar* statistics, std::int64_t rows,
                      std::int64_t size, bool exact, int threads) {
  using Bits = typename Traits<T>::Bits;
  const Geometry geometry(size, exact);
  const SampleTable table(geometry);
  if (rows * size < kSerial) threads = 1;
  std::vector<Partial> partials(rows * geometry.chunks);
  const std::int64_t gathered = geometry.is_sampled() ? geometry.samples : 0;
  const Scratch<Bits, 0> scratch(rows * gathered);
  Bits* samples = scratch.data();

  std::vector<std::atomic<std::int64_t>> waiting(rows);  // chunks that are not summarized yet
  for (auto& chunks : waiting) chunks = geometry.chunks;

  parallel_for(rows * geometry.chunks, threads, [&](std::int64_t task) {
    const std::int64_t row = task / geometry.chunks, chunk = task % geometry.chunks;
    const T* values = x + row * size;
    Bits* sampled = gathered ? samples + row * gathered : nullptr;
    partials[task] = summarize(values, geometry, chunk, table, sampled);
    // whoever comes last has most of the sample in its cache, and leaves the memory to the others
    if (--waiting[row] == 0)
      finish_row(values, &partials[row * geometry.chunks], geometry,
                 gathered ? sampled : reinterpret_cast<const Bits*>(values),
                 statistics + row * kColumns);
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

}  // namespace quanttune
