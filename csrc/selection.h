// The k-th smallest magnitude of many: a few of them tell between which two values it lies, and a pass
// over all copies what lies there. Floats of one sign are ordered like their bits.

#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "memory.h"
#include "sampling.h"
#include "simd.h"

#if defined(__x86_64__) && !defined(QUANTTUNE_PORTABLE)
#include <immintrin.h>
#endif

namespace quanttune {

template <class Bits>
struct Selected {
  Bits bits;
  std::int64_t count;  // how many are equal to it
};

namespace selection {

// The magnitudes from `low` up to `low` + `span`.
template <class Wide>
struct Bracket {
  Wide low, span;
};

struct Picked {
  std::int64_t below, count;
};

// Copies the magnitudes of `from` in the bracket to `to`, which has room for all of them and a vector more.
template <class Bits, class Wide>
Picked pick_any(const Bits* from, std::int64_t size, Bracket<Wide> bracket, Wide* to) {
  constexpr Wide kMagnitude = Wide(Bits(-1) >> 1);
  Picked picked{0, 0};
  for (std::int64_t i = 0; i < size; ++i) {  // without a branch: nobody can predict it
    const Wide bits = from[i] & kMagnitude;
    to[picked.count] = bits;
    picked.below += bits < bracket.low;
    picked.count += bits - bracket.low <= bracket.span;
  }
  return picked;
}

#if defined(__x86_64__) && !defined(QUANTTUNE_PORTABLE)
template <class Bits>
__attribute__((target("avx512f,popcnt"))) Picked pick_avx512(const Bits* from, std::int64_t size,
                                                             Bracket<std::uint32_t> bracket,
                                                             std::uint32_t* to) {
  constexpr std::uint32_t kMagnitude = Bits(-1) >> 1;
  const __m512i low = _mm512_set1_epi32(int(bracket.low));
  const __m512i span = _mm512_set1_epi32(int(bracket.span));
  Picked picked{0, 0};
  std::int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    Words bits;
    if constexpr (sizeof(Bits) == 2)
      bits = convert<Words>(load_bits<Halves>(from + i));
    else
      bits = load_bits<Words>(from + i);
    bits &= kMagnitude;
    const __mmask16 below = _mm512_cmplt_epu32_mask(__m512i(bits), low);
    const __mmask16 inside = _mm512_cmple_epu32_mask(__m512i(bits - bracket.low), span);
    _mm512_storeu_si512(to + picked.count, _mm512_maskz_compress_epi32(inside, __m512i(bits)));
    picked.below += __builtin_popcount(below);
    picked.count += __builtin_popcount(inside);
  }
  const Picked rest = pick_any(from + i, size - i, bracket, to + picked.count);
  return {picked.below + rest.below, picked.count + rest.count};
}
#endif

template <class Bits, class Wide>
Picked pick(const Bits* from, std::int64_t size, Bracket<Wide> bracket, Wide* to) {
#if defined(__x86_64__) && !defined(QUANTTUNE_PORTABLE)
  if constexpr (sizeof(Wide) == 4) {
    static const bool has_avx512 = __builtin_cpu_supports("avx512f");
    if (has_avx512) return pick_avx512(from, size, bracket, to);
  }
#endif
  return pick_any(from, size, bracket, to);
}

constexpr std::int64_t kProbes = 512;
constexpr std::int64_t kMargin = 28;  // ranks of the probes: 2.5 standard deviations of a median's

// Where the element of rank `rank` of `size` probably is.
template <class Bits, class Wide>
Bracket<Wide> guess(const Bits* data, std::int64_t size, std::int64_t rank, Wide all) {
  if (size < 4 * kProbes) return {0, all};
  const std::int64_t stride = size / kProbes;
  Wide probes[kProbes];
  for (std::int64_t i = 0; i < kProbes; ++i)
    probes[i] = data[i * stride + pick_of_stratum(std::uint32_t(i), stride)] & all;
  const auto middle = std::int64_t(double(rank) / double(size) * kProbes);
  const std::int64_t low = std::max<std::int64_t>(middle - kMargin, 0);
  const std::int64_t high = std::min(middle + kMargin, kProbes - 1);
  std::nth_element(probes, probes + low, probes + kProbes);
  std::nth_element(probes + low + 1, probes + high, probes + kProbes);
  return {probes[low], probes[high] - probes[low]};
}

constexpr int kDigit = 10;
constexpr int kBuckets = 1 << kDigit;

// Counts the elements of a bracket in buckets of 2^shift values; returns the bucket that holds the element
// of rank `rank`, which becomes its rank in there, and how many share it.
template <class Wide>
std::pair<Wide, std::int64_t> find_bucket(const Wide* data, std::int64_t size, Wide low, int shift,
                                          std::int64_t& rank) {
  std::uint32_t even[kBuckets] = {}, odd[kBuckets] = {};  // two, so that equal ones do not wait
  std::int64_t i = 0;
  for (; i + 1 < size; i += 2) {
    ++even[(data[i] - low) >> shift];
    ++odd[(data[i + 1] - low) >> shift];
  }
  if (i < size) ++even[(data[i] - low) >> shift];
  for (Wide bucket = 0;; ++bucket) {
    const std::int64_t count = std::int64_t(even[bucket]) + odd[bucket];
    if (rank < count) return {bucket, count};
    rank -= count;
  }
}

}  // namespace selection

// The element of 0-based rank `rank` among the magnitudes of `data`; the sign bit counts for nothing.
template <class Bits>
Selected<Bits> select_magnitude(const Bits* data, std::int64_t size, std::int64_t rank) {
  using namespace selection;
  using Wide = std::conditional_t<sizeof(Bits) == 8, std::uint64_t, std::uint32_t>;
  constexpr Wide kAll = Wide(Bits(-1) >> 1);
  const Scratch<Wide, 1> picked(size + kLanes);
  Bracket<Wide> bracket = guess(data, size, rank, kAll);
  Picked got = pick(data, size, bracket, picked.data());
  if (rank < got.below || rank >= got.below + got.count) {  // then it is on that side of the bracket
    const Wide above = bracket.low + bracket.span + 1;
    bracket = rank < got.below ? Bracket<Wide>{0, bracket.low - 1} : Bracket<Wide>{above, kAll - above};
    got = pick(data, size, bracket, picked.data());
  }
  rank -= got.below;
  for (;;) {
    int shift = 0;
    while (bracket.span >> shift >= kBuckets) ++shift;
    const auto [bucket, count] = find_bucket(picked.data(), got.count, bracket.low, shift, rank);
    bracket = {bracket.low + (bucket << shift), (Wide(1) << shift) - 1};
    if (shift == 0) return {Bits(bracket.low), count};
    got = pick(picked.data(), got.count, bracket, picked.data());
  }
}

}  // namespace quanttune
