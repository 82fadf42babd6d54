#include "range_search.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "codes.h"
#include "grid_bins.h"
#include "parallel.h"

namespace quanttune {

namespace {

// Tasks depend on the size alone, so any number of threads gives the same bits.
constexpr std::int64_t kChunk = 1 << 14;   // elements of a task that tries candidates
constexpr std::int64_t kPiece = 1 << 10;   // of these, what stays in a first-level cache
constexpr std::int64_t kBinned = 1 << 18;  // elements of a task that puts them into bins, at least
constexpr std::int64_t kMostBinned = 32;   // such tasks, each with its own bins
constexpr std::int64_t kCounted = 1 << 20;  // elements of a task that counts
constexpr std::int64_t kSerial = 1 << 15;  // elements below which waking a thread costs more
constexpr int kTables = 4;  // neighbours count apart: equal ones would wait for each other's store

std::int64_t tasks_of(std::int64_t size, std::int64_t task) { return (size + task - 1) / task; }

// Adds the squared errors of a piece to `sums`, kLanes per candidate. A code has at most 17 bits and a step
// 24, so their product is exact. Loops over scalars: the compiler widens them best on each machine.
template <class T>
QUANTTUNE_CLONES void add_errors(const T* x, std::int64_t size, const float* steps,
                                 std::int64_t candidates, Bounds bounds, double* sums) {
  float values[kPiece] = {}, codes[kPiece];  // what lies beyond the end is 0, and so is its error
  double wide[kPiece];
  for_lanes(size, [&](std::int64_t i, std::int64_t count) QUANTTUNE_BODY {
    store(values + i, load_some(x + i, count));
  });
  for (std::int64_t i = 0; i < kPiece; ++i) wide[i] = values[i];
  for (std::int64_t k = 0; k < candidates; ++k) {
    const float step = steps[k];
    for (std::int64_t i = 0; i < kPiece; ++i) codes[i] = code_of(values[i], step, bounds);
    double lanes[kLanes];
    std::copy_n(sums + k * kLanes, kLanes, lanes);
    for (std::int64_t i = 0; i < kPiece; i += kLanes) {
      for (std::int64_t lane = 0; lane < kLanes; ++lane) {
        const double error = wide[i + lane] - double(codes[i + lane]) * double(step);
        lanes[lane] += error * error;
      }
    }
    std::copy_n(lanes, kLanes, sums + k * kLanes);
  }
}

template <class T>
void try_each(const T* x, const float* steps, double* errors, std::int64_t size,
                  std::int64_t candidates, Bounds bounds, int threads) {
  const std::int64_t tasks = tasks_of(size, kChunk);
  std::vector<double> partials(tasks * candidates);
  parallel_for(tasks, threads, [&](std::int64_t task) {
    std::vector<double> sums(candidates * kLanes);
    const std::int64_t end = std::min(size, (task + 1) * kChunk);
    for (std::int64_t at = task * kChunk; at < end; at += kPiece)
      add_errors(x + at, std::min(kPiece, end - at), steps, candidates, bounds, sums.data());
    for (std::int64_t k = 0; k < candidates; ++k)
      partials[task * candidates + k] = sum_of(load(sums.data() + k * kLanes));
  });
  std::fill(errors, errors + candidates, 0.0);
  for (std::int64_t i = 0; i < tasks * candidates; ++i) errors[i % candidates] += partials[i];
}

// The same where bins pay, which is several times faster. False if an element is not finite.
template <class T>
bool try_bins(const T* x, const float* steps, double* errors, std::int64_t size,
              std::int64_t candidates, Bounds bounds, int threads) {
  const GridBins bins(steps, candidates, bounds, threads);
  const std::int64_t tasks = std::clamp<std::int64_t>(size / kBinned, 1, kMostBinned);
  const std::int64_t length = tasks_of(size, tasks);
  std::vector<BinSums> sums(tasks, BinSums(bins.bins()));
  parallel_for(tasks, threads, [&](std::int64_t task) {
    const std::int64_t start = task * length;
    bins.add(x + start, std::min(length, size - start), sums[task]);
  });
  for (std::int64_t task = 1; task < tasks; ++task) sums[0].add(sums[task]);
  if (!std::isfinite(sums[0].squares)) return false;
  parallel_for(candidates, threads, [&](std::int64_t k) { errors[k] = bins.error(sums[0], k); });
  for (std::int64_t k = 0; k < candidates; ++k)
    if (std::isnan(errors[k])) try_each(x, steps + k, errors + k, size, 1, bounds, threads);
  return true;
}

// `tables` has kTables counters per bin. NaN fails the comparison, and counts in the last bin.
template <class T>
QUANTTUNE_CLONES void count_bins(const T* x, std::int64_t size, float width, std::int64_t bins,
                                 std::uint32_t* tables) {
  const Floats step = splat(width), last = splat(float(bins - 1));
  for_lanes(size, [&](std::int64_t i, std::int64_t count) QUANTTUNE_BODY {
    const Floats position = magnitude(load_some(x + i, count)) / step;
    const Words bin = convert<Words>(convert<Masks>(position < last ? position : last));
    for (std::int64_t lane = 0; lane < count; ++lane)
      ++tables[bin[lane] * kTables + lane % kTables];
  });
}

template <class T>
void histogram_typed(const T* x, std::int64_t* counts, std::int64_t size, float width,
                     std::int64_t bins, int threads) {
  const std::int64_t tasks = tasks_of(size, kCounted);
  std::vector<std::uint32_t> partials(tasks * bins);
  parallel_for(tasks, threads, [&](std::int64_t task) {
    std::vector<std::uint32_t> tables(bins * kTables);
    const std::int64_t start = task * kCounted;
    count_bins(x + start, std::min(kCounted, size - start), width, bins, tables.data());
    for (std::int64_t i = 0; i < bins * kTables; ++i)
      partials[task * bins + i / kTables] += tables[i];
  });
  std::fill(counts, counts + bins, 0);
  for (std::int64_t i = 0; i < tasks * bins; ++i) counts[i % bins] += partials[i];
}

}  // namespace

void quantization_errors(const void* x, const float* steps, double* errors, Type type,
                         std::int64_t size, std::int64_t candidates, int qmin, int qmax,
                         int threads) {
  const Bounds bounds{float(qmin), float(qmax)};
  if (size * candidates < kSerial) threads = 1;
  dispatch(type, [&](auto tag) {
    const auto* values = static_cast<const decltype(tag)*>(x);
    if (!GridBins::pays(steps, candidates, bounds, size) ||
        !try_bins(values, steps, errors, size, candidates, bounds, threads))
      try_each(values, steps, errors, size, candidates, bounds, threads);
  });
}

void magnitude_histogram(const void* x, std::int64_t* counts, Type type, std::int64_t size,
                         float width, std::int64_t bins, int threads) {
  dispatch(type, [&](auto tag) {
    histogram_typed(static_cast<const decltype(tag)*>(x), counts, size, width, bins, threads);
  });
}

}  // namespace quanttune
