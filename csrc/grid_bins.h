// The squared errors of many grids from one look at each element: which of the bins it is in that lie
// between the thresholds of all grids, where codes change.
//
// All elements of a bin have the same code, on each grid. With a bin's anchor a and d = x - a, the errors of
// code c add up to n (a - c)^2 + 2 (a - c) sum(d) + sum(d^2), the last of which is the same for all grids.
// These cancel where elements are near the grid and far from the anchors: see kCancelled.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "codes.h"
#include "parallel.h"

namespace quanttune {

// What a part of the elements adds: per bin how many, and by how much they exceed the anchor.
struct BinSums {
  explicit BinSums(std::int64_t bins) : counts(bins), excess(bins) {}

  void add(const BinSums& other) {
    for (std::size_t bin = 0; bin < counts.size(); ++bin) {
      counts[bin] += other.counts[bin];
      excess[bin] += other.excess[bin];
    }
    squares += other.squares;
  }

  std::vector<double> counts, excess;
  double squares = 0;  // of what exceeds
};

class GridBins {
 public:
  // More thresholds than this, or fewer elements, and trying each grid on each element is faster.
  static constexpr std::int64_t kMostThresholds = 65000, kFewestElements = 1 << 17;

  static bool pays(const float* steps, std::int64_t grids, Bounds bounds, std::int64_t size) {
    if (grids == 0 || size < kFewestElements) return false;
    const auto [least, most] = std::minmax_element(steps, steps + grids);
    // cells are as wide for the finest grid as for the coarsest
    return grids * std::int64_t(bounds.high - bounds.low) <= kMostThresholds && bounds.high > bounds.low &&
           *least > 1e-30f && *most < 1e30f && *most <= 1000 * *least;
  }

  GridBins(const float* steps, std::int64_t grids, Bounds bounds, int threads)
      : steps_(steps), bounds_(bounds), levels_(std::int64_t(bounds.high - bounds.low)) {
    std::vector<float> thresholds(grids * levels_);
    parallel_for(grids, threads, [&](std::int64_t grid) {
      for (std::int64_t level = 0; level < levels_; ++level)
        thresholds[grid * levels_ + level] = threshold(steps[grid], bounds.low + 1 + level);
    });
    const auto [low, high] = std::minmax_element(thresholds.begin(), thresholds.end());
    low_ = *low;
    cells_per_unit_ = float(kCells) / std::max(*high - *low, std::numeric_limits<float>::min());
    sort_by_cell(thresholds);
    for (float at : thresholds) ranks_.push_back(rank_of(at));
  }

  std::int64_t bins() const { return std::int64_t(ranks_.size()) + 1; }

  template <class T>
  QUANTTUNE_CLONES void add(const T* x, std::int64_t size, BinSums& sums) const {
    constexpr std::int64_t kBlock = 256;
    const float *anchors = anchors_.data(), *edges = anchors + 1;
    double *counts = sums.counts.data(), *excesses = sums.excess.data(), squares = 0;
    for (std::int64_t begin = 0; begin < size; begin += kBlock) {
      float values[kBlock];
      std::int32_t cells[kBlock];
      const std::int64_t length = std::min(kBlock, size - begin);
      for_lanes(length, [&](std::int64_t i, std::int64_t count) QUANTTUNE_BODY {
        store(values + i, load_some(x + begin + i, count));
      });
      for (std::int64_t i = 0; i < length; ++i) cells[i] = cell_of(values[i]);
      double of_block = 0;
      for (std::int64_t i = 0; i < length; ++i) {
        const float value = values[i];
        std::int64_t bin = first_[cells[i]];
        // most often none or one, which no branch could foresee; the last edge is NaN
        bin += value >= edges[bin];
        while (value >= edges[bin]) ++bin;
        const double excess = double(value) - double(anchors[bin]);
        counts[bin] += 1;
        excesses[bin] += excess;
        of_block += excess * excess;
      }
      squares += of_block;
    }
    sums.squares += squares;
  }

  // NaN where so little of the terms is left that it may be their rounding: that grid is to be tried.
  QUANTTUNE_CLONES double error(const BinSums& sums, std::int64_t grid) const {
    const double step = steps_[grid];
    const double *counts = sums.counts.data(), *excess = sums.excess.data();
    double lanes[kLanes] = {};
    std::int64_t bin = 0;
    for (std::int64_t level = 0; level <= levels_; ++level) {
      const double center = (double(bounds_.low) + double(level)) * step;
      const std::int64_t end = level < levels_ ? ranks_[grid * levels_ + level] + 1 : bins();
      const auto error_of = [&](std::int64_t at) QUANTTUNE_BODY {
        const double distance = double(anchors_[at]) - center;
        return distance * (distance * counts[at] + 2 * excess[at]);
      };
      for (; bin + kLanes <= end; bin += kLanes)
        for (std::int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] += error_of(bin + lane);
      for (; bin < end; ++bin) lanes[0] += error_of(bin);
    }
    double error = sums.squares;
    for (double lane : lanes) error += lane;
    return error > kCancelled * sums.squares ? error : std::numeric_limits<double>::quiet_NaN();
  }

 private:
  static constexpr std::int64_t kCells = 1 << 17;
  // Sums of 2^18 squares are off by 1e-13 as a rule, so what is left is right to 1e-10. Of 16-bit numbers, which
  // are few and round alike, they would be by 1e-12 in one go: hence those of blocks.
  static constexpr double kCancelled = 1e-3;

  // The smallest number that has the code: codes do not fall with the number.
  float threshold(float step, float code) const {
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    float at = float((double(code) - 0.5) * double(step));
    while (code_of(at, step, bounds_) >= code) at = std::nextafter(at, -kInfinity);
    while (code_of(at, step, bounds_) < code) at = std::nextafter(at, kInfinity);
    return at;
  }

  // Falls with no number, so whatever is in a lower cell is smaller. NaN is in the first.
  QUANTTUNE_INLINE std::int32_t cell_of(float value) const {
    const float position = (value - low_) * cells_per_unit_, last = float(kCells - 1);
    const float positive = position > 0 ? position : 0;
    return std::int32_t(positive < last ? positive : last);
  }

  void sort_by_cell(const std::vector<float>& thresholds) {
    first_.assign(kCells + 1, 0);
    for (float at : thresholds) ++first_[cell_of(at) + 1];
    for (std::int64_t cell = 0; cell < kCells; ++cell) first_[cell + 1] += first_[cell];
    anchors_.resize(thresholds.size() + 2);
    std::vector<std::uint16_t> next(first_.begin(), first_.end() - 1);
    float* edges = anchors_.data() + 1;
    for (float at : thresholds) edges[next[cell_of(at)]++] = at;
    for (std::int64_t cell = 0; cell < kCells; ++cell)
      std::sort(edges + first_[cell], edges + first_[cell + 1]);
    anchors_.front() = edges[0];
    anchors_.back() = std::numeric_limits<float>::quiet_NaN();
  }

  // Among equal edges any does: no element is between them.
  std::int32_t rank_of(float threshold) const {
    const std::int32_t cell = cell_of(threshold);
    const float* edges = anchors_.data() + 1;
    return std::int32_t(
        std::lower_bound(edges + first_[cell], edges + first_[cell + 1], threshold) - edges);
  }

  const float* steps_;
  Bounds bounds_;
  std::int64_t levels_;
  float low_, cells_per_unit_;
  std::vector<std::uint16_t> first_;  // per cell: how many edges are in lower ones
  std::vector<float> anchors_;        // the first edge, all edges in order, NaN
  std::vector<std::int32_t> ranks_;   // per grid and level: which edge ends it
};

}  // namespace quanttune
