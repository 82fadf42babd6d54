// The k-th smallest magnitude of many: a few of them tell between which two values it probably lies, and
// what lies there is picked out. Floats of one sign are ordered like their bits.

#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#include "memory.h"
#include "simd.h"

#if defined(__x86_64__) && !defined(QUANTTUNE_PORTABLE)
#include <immintrin.h>
#endif

namespace quanttune {

// The bits of 16-bit formats are handled in 32.
template <class Bits>
using Wide = std::conditional_t<sizeof(Bits) == 8, std::uint64_t, std::uint32_t>;

template <class Bits>
constexpr Wide<Bits> kMagnitude = Bits(-1) >> 1;

// The magnitudes from `low` up to `low` + `span`.
template <class Bits>
struct Bracket {
  Wide<Bits> low = 0, span = kMagnitude<Bits>;
};

struct Picked {
  std::int64_t below = 0, count = 0;  // the bracket; in it

  void add(const Picked& other) {
    below += other.below;
    count += other.count;
  }
  bool holds(std::int64_t rank) const { return rank >= below && rank < below + count; }
};

template <class Bits>
struct Selected {
  Bits bits;
  std::int64_t count;  // how many are equal to it
};

namespace selection {

template <class Bits, class From>
Picked pick_any(const From* from, std::int64_t size, Bracket<Bits> bracket, Wide<Bits>* to) {
  Picked picked;
  for (std::int64_t i = 0; i < size; ++i) {  // without a branch: nobody can predict it
    const Wide<Bits> bits = from[i] & kMagnitude<Bits>;
    to[picked.count] = bits;
    picked.below += bits < bracket.low;
    picked.count += bits - bracket.low <= bracket.span;
  }
  return picked;
}

#if defined(__x86_64__) && !defined(QUANTTUNE_PORTABLE)
template <class Bits, class From>
__attribute__((target("avx512f,popcnt"))) Picked pick_avx512(const From* from, std::int64_t size,
                                                             Bracket<Bits> bracket,
                                                             std::uint32_t* to) {
  const __m512i low = _mm512_set1_epi32(int(bracket.low));
  const __m512i span = _mm512_set1_epi32(int(bracket.span));
  Picked picked;
  std::int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    const Words bits = load_words(from + i) & kMagnitude<Bits>;
    const __mmask16 below = _mm512_cmplt_epu32_mask(__m512i(bits), low);
    const __mmask16 inside = _mm512_cmple_epu32_mask(__m512i(bits - bracket.low), span);
    _mm512_storeu_si512(to + picked.count, _mm512_maskz_compress_epi32(inside, __m512i(bits)));
    picked.below += __builtin_popcount(below);
    picked.count += __builtin_popcount(inside);
  }
  picked.add(pick_any(from + i, size - i, bracket, to + picked.count));
  return picked;
}
#endif

// Copies the magnitudes of `from` in the bracket to `to`, which has room for all of them and a vector more.
// `from` is of Bits or Wide<Bits>, and may be `to`.
template <class Bits, class From>
Picked pick(const From* from, std::int64_t size, Bracket<Bits> bracket, Wide<Bits>* to) {
#if defined(__x86_64__) && !defined(QUANTTUNE_PORTABLE)
  if constexpr (sizeof(Bits) <= 4) {
    static const bool has_avx512 = __builtin_cpu_supports("avx512f");
    if (has_avx512) return pick_avx512(from, size, bracket, to);
  }
#endif
  return pick_any(from, size, bracket, to);
}

// The element of rank `rank` among SIZE magnitudes, bit by bit: few instructions, and no branch on the data.
template <std::int64_t SIZE, class Bits>
QUANTTUNE_INLINE Wide<Bits> element_of_rank(const Wide<Bits>* data, std::int64_t rank) {
  using Signed = std::make_signed_t<Wide<Bits>>;  // AVX2 compares signed integers only
  Wide<Bits> element = 0;
  for (int bit = 8 * sizeof(Bits) - 2; bit >= 0; --bit) {
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

}  // namespace selection

// The element of 0-based rank `rank` among what was picked of a bracket into `data`, which it overwrites.
template <class Bits>
Selected<Bits> select_picked(Wide<Bits>* data, std::int64_t size, Bracket<Bits> bracket,
                             std::int64_t rank) {
  using namespace selection;
  for (;;) {
    int shift = 0;
    while (bracket.span >> shift >= kBuckets) ++shift;
    const auto [bucket, count] = find_bucket(data, size, bracket.low, shift, rank);
    bracket = {bracket.low + (bucket << shift), (Wide<Bits>(1) << shift) - 1};
    if (shift == 0) return {Bits(bracket.low), count};
    size = pick(data, size, bracket, data).count;
  }
}

// The same among all magnitudes of `data`; the sign bit counts for nothing.
template <class Bits>
Selected<Bits> select_magnitude(const Bits* data, std::int64_t size, std::int64_t rank) {
  const Scratch<Wide<Bits>, 1> magnitudes(size + kLanes);
  const Bracket<Bits> any;
  selection::pick(data, size, any, magnitudes.data());
  return select_picked(magnitudes.data(), size, any, rank);
}

}  // namespace quanttune
