#include "outlier_statistics.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <vector>

#include "memory.h"
#include "parallel.h"
#include "selection.h"
#include "summary.h"

namespace quanttune {

namespace {

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

struct Centre {
  double mean, squares;  // sum of (x - mean)^2
};

template <class T>
QUANTTUNE_CLONES Moments moments_in_float64(const T* x, std::int64_t size, double pivot) {
  MomentSums<Doubles> sums(pivot);
  sums.add(x, size);
  return sums.result();
}

template <class T>
Centre centre_of(const Row<T>& row, const Moments& moments) {
  const std::int64_t size = row.geometry.size;
  const auto about = [size](double pivot, const Moments& sums) {
    return Centre{pivot + sums.sum / double(size), sums.centred(size)};
  };
  if (moments.is_precise(size) || moments.maximum == 0) return about(row.glimpse.pivot, moments);
  const double mean = moments_in_float64(row.x, size, 0).sum / double(size);
  return about(mean, moments_in_float64(row.x, size, mean));
}

template <class T>
Selected<typename Traits<T>::Bits> median_of(const Row<T>& row) {
  using Bits = typename Traits<T>::Bits;
  const Geometry& geometry = row.geometry;
  const std::int64_t rank = (geometry.samples - 1) / 2;
  Picked all;
  for (std::int64_t i = 0; i < geometry.chunks; ++i) {
    const Wide<Bits>* from = row.picked + i * row.room;
    std::copy(from, from + row.partials[i].picked.count, row.picked + all.count);
    all.add(row.partials[i].picked);
  }
  if (all.holds(rank))
    return select_picked(row.picked, all.count, row.glimpse.bracket, rank - all.below);
  if (!geometry.is_sampled())
    return select_magnitude(reinterpret_cast<const Bits*>(row.x), geometry.size, rank);
  const Scratch<Bits, 2> sample(geometry.samples);
  std::int64_t count = 0;
  for (std::int64_t begin = 0; begin < geometry.size; begin += geometry.piece)
    count += row.sample->gather(geometry, row.x, begin, sample.data() + count);
  return select_magnitude(sample.data(), geometry.samples, rank);
}

template <class T, class Result>
void finish_row(const Row<T>& row, Result* out) {
  const Geometry& geometry = row.geometry;
  Moments moments;
  for (std::int64_t i = 0; i < geometry.chunks; ++i) moments.add(row.partials[i].moments);
  const Centre centre = centre_of(row, moments);
  const double freedom = double(std::max<std::int64_t>(geometry.size - 1, 1));
  // max(NaN, 0) is NaN in this order of arguments; infinities make the sums NaN or inf
  const double deviation = std::sqrt(std::max(centre.squares, 0.0) / freedom);
  if (!std::isfinite(deviation)) {
    std::fill(out, out + kColumns, std::numeric_limits<Result>::quiet_NaN());
    return;
  }
  std::int64_t count = 0;
  for (std::int64_t i = 0; i < geometry.chunks; ++i)
    if (row.partials[i].moments.maximum == moments.maximum)
      count += count_magnitude(row.x + i * geometry.chunk, geometry.length(i),
                               Result(moments.maximum));
  const auto median = median_of(row);
  const double middle = to_double(bit_cast<T>(median.bits));
  out[kMaximum] = Result(moments.maximum);
  out[kMedian] = Result(middle);
  out[kMean] = Result(centre.mean);
  out[kDeviation] = Result(deviation);
  out[kRatio] = Result(deviation == 0 ? 0 : (moments.maximum - middle) / deviation);
  out[kMaximumCount] = Result(count);
  out[kMedianCount] = Result(median.count);
}

template <class T>
void statistics_typed(const T* x, typename Traits<T>::Scalar* statistics, std::int64_t rows,
                      std::int64_t size, bool exact, const Range* ranges, int threads) {
  const Geometry whole(size, exact);
  const Sample* sample = Sample::of(whole);
  const std::int64_t chunks = whole.chunks;
  const std::int64_t room = whole.chunk / whole.stride + kLanes;
  const Scratch<Wide<typename Traits<T>::Bits>, 0> picked(rows * chunks * room);
  std::vector<Glimpse<T>> glimpses(rows);
  std::vector<Partial> partials(rows * chunks);
  std::vector<std::atomic<std::int64_t>> waiting(rows);  // chunks that are not summarized yet
  if (rows * size < kSerial) threads = 1;
  const auto at = [&](std::int64_t row) {
    const std::int64_t begin = ranges ? ranges[row].begin : 0, first = row * chunks;
    return Row<T>{x + row * size + begin, ranges ? whole.part(ranges[row].size) : whole, sample,
                  glimpses[row], &partials[first], picked.data() + first * room, room};
  };

  parallel_for(rows, threads, [&](std::int64_t index) {
    const Row<T> row = at(index);
    waiting[index] = row.geometry.chunks;
    if (row.geometry.size) glimpses[index] = glimpse(row.x, row.geometry.size);
    else std::fill_n(statistics + index * kColumns, kColumns, 0);
  });
  parallel_for(rows * chunks, threads, [&](std::int64_t task) {
    const std::int64_t index = task / chunks, chunk = task % chunks;
    const Row<T> row = at(index);
    if (chunk >= row.geometry.chunks) return;
    summarize(row, chunk);
    // whoever comes last has most of what was picked in its cache, and leaves the memory to the others
    if (--waiting[index] == 0) finish_row(row, statistics + index * kColumns);
  });
}

}  // namespace

void outlier_statistics(const void* x, void* statistics, Type type, std::int64_t rows,
                        std::int64_t size, bool exact, const Range* ranges, int threads) {
  dispatch(type, [&](auto tag) {
    using T = decltype(tag);
    statistics_typed(static_cast<const T*>(x),
                     static_cast<typename Traits<T>::Scalar*>(statistics), rows, size, exact,
                     ranges, threads);
  });
}

}  // namespace quanttune
