// What a few elements of a row tell of all of it, before it is read. Whatever they tell, the result is right;
// it takes longer where they mislead.

#pragma once

#include <cstdint>

#include "moments.h"
#include "sampling.h"
#include "selection.h"

namespace quanttune {

template <class T>
struct Glimpse {
  using Bits = typename Traits<T>::Bits;
  using Scalar = typename Traits<T>::Scalar;

  Scalar pivot;           // near the mean
  Bracket<Bits> bracket;  // of the median magnitude, probably
};

// 64 vectors, each at random in its part of the row: as many misses of the caches.
template <class T>
QUANTTUNE_CLONES Glimpse<T> glimpse(const T* row, std::int64_t size) {
  using Bits = typename Traits<T>::Bits;
  using Vector = typename Traits<T>::Vector;
  using Scalar = typename Traits<T>::Scalar;
  constexpr std::int64_t kVectors = 64, kElements = kVectors * kLanes;
  constexpr std::int64_t kMargin = 40;  // ranks: 2.5 standard deviations of a median's
  if (size < 4 * kElements) {
    MomentSums<Vector> sums{Scalar(0)};
    sums.add(row, size);
    return {Scalar(sums.result().sum / double(size)), {}};
  }
  Vector sum{};
  Wide<Bits> magnitudes[kElements];
  for (std::int64_t vector = 0; vector < kVectors; ++vector) {
    const std::int64_t part = size / kVectors;
    const T* from = row + vector * part + pick_of_stratum(std::uint32_t(vector), part - kLanes);
    sum += convert<Vector>(load(from));
    for (int lane = 0; lane < kLanes; ++lane)
      magnitudes[vector * kLanes + lane] = bit_cast<Bits>(from[lane]) & kMagnitude<Bits>;
  }
  constexpr int kLess = 8 * sizeof(Bits) - 16;
  const auto of_rank = [&](std::int64_t rank) QUANTTUNE_BODY {
    return selection::element_of_rank<kElements, Bits>(magnitudes, rank, kLess);
  };
  const Wide<Bits> low = of_rank(kElements / 2 - kMargin), high = of_rank(kElements / 2 + kMargin);
  const Wide<Bits> span = high - low + (Wide<Bits>(1) << kLess) - 1;
  return {Scalar(sum_of(convert<Doubles>(sum)) / double(kElements)), {low, span}};
}

}  // namespace quanttune
