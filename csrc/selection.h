// The k-th smallest magnitude of many: a few of them tell between which two values it probably lies, and
// what lies there is picked out.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "memory.h"
#include "sieve.h"

namespace quanttune {

template <class Bits>
struct Selected {
  Bits bits;
  std::int64_t count;  // how many are equal to it
};

namespace selection {

// The element of rank `rank` among SIZE magnitudes, without its last `less` bits; bit by bit, which takes few
// instructions and no branch on the data.
template <std::int64_t SIZE, class Bits>
QUANTTUNE_INLINE Wide<Bits> element_of_rank(const Wide<Bits>* data, std::int64_t rank, int less) {
  using Signed = std::make_signed_t<Wide<Bits>>;  // AVX2 compares signed integers only
  Wide<Bits> element = 0;
  for (int bit = 8 * sizeof(Bits) - 2; bit >= less; --bit) {
    const Wide<Bits> next = element | (Wide<Bits>(1) << bit);
    Signed below = 0;
    for (std::int64_t i = 0; i < SIZE; ++i) below += Signed(data[i]) < Signed(next);
    if (below <= rank) element = next;
  }
  return element;
}

constexpr int kDigit = 10;
constexpr int kBuckets = 1 << kDigit;

// Counts the elements of a bracket in buckets of 2^shift values; returns the bucket that holds the element
// of rank `rank`, which becomes its rank in there, and how many share it.
template <class Element>
std::pair<Element, std::int64_t> find_bucket(const Element* data, std::int64_t size, Element low,
                                             int shift, std::int64_t& rank) {
  std::uint32_t even[kBuckets] = {}, odd[kBuckets] = {};  // two, so that equal ones do not wait
  std::int64_t i = 0;
  for (; i + 1 < size; i += 2) {
    ++even[(data[i] - low) >> shift];
    ++odd[(data[i + 1] - low) >> shift];
  }
  if (i < size) ++even[(data[i] - low) >> shift];
  for (Element bucket = 0;; ++bucket) {
    const std::int64_t count = std::int64_t(even[bucket]) + odd[bucket];
    if (rank < count) return {bucket, count};
    rank -= count;
  }
}

// What is picked of a bracket is spread about evenly in it: between which two values that of rank `rank` is.
template <class Bits>
Bracket<Bits> narrow(Bracket<Bits> bracket, std::int64_t size, std::int64_t rank) {
  const double step = double(bracket.span) / double(size), margin = 3 * std::sqrt(double(size));
  const auto low = Wide<Bits>(std::max(0.0, (double(rank) - margin) * step));
  const auto high = Wide<Bits>(std::min(double(size), double(rank) + margin) * step);
  return {bracket.low + low, high - low};
}

template <class Bits>
Selected<Bits> select_digitwise(Wide<Bits>* data, std::int64_t size, Bracket<Bits> bracket,
                                std::int64_t rank) {
  for (;;) {
    int shift = 0;
    while (bracket.span >> shift >= kBuckets) ++shift;
    const auto [bucket, count] = find_bucket(data, size, bracket.low, shift, rank);
    bracket = {bracket.low + (bucket << shift), (Wide<Bits>(1) << shift) - 1};
    if (shift == 0) return {Bits(bracket.low), count};
    size = pick(data, size, bracket, data).count;
  }
}

}  // namespace selection

// The element of 0-based rank `rank` among what was picked of a bracket into `data`, which it overwrites.
template <class Bits>
Selected<Bits> select_picked(Wide<Bits>* data, std::int64_t size, Bracket<Bits> bracket,
                             std::int64_t rank) {
  using namespace selection;
  if (bracket.span >= kBuckets && size >= kBuckets) {
    const Bracket<Bits> narrower = narrow(bracket, size, rank);
    const Scratch<Wide<Bits>, 3> few(size + kLanes);
    const Picked picked = pick(data, size, narrower, few.data());
    if (picked.holds(rank))
      return select_digitwise(few.data(), picked.count, narrower, rank - picked.below);
  }
  return select_digitwise(data, size, bracket, rank);
}

// The same among all magnitudes of `data`; the sign bit counts for nothing.
template <class Bits>
Selected<Bits> select_magnitude(const Bits* data, std::int64_t size, std::int64_t rank) {
  const Scratch<Wide<Bits>, 1> magnitudes(size + kLanes);
  const Bracket<Bits> any;
  pick(data, size, any, magnitudes.data());
  return select_picked(magnitudes.data(), size, any, rank);
}

}  // namespace quanttune
