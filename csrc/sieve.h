// Picking those magnitudes out of many that lie between two values. Floats of one sign are ordered like their
// bits.

#pragma once

#include <cstdint>
#include <type_traits>

#include "simd.h"

#if defined(__x86_64__) && !defined(QUANTTUNE_PORTABLE)
#include <immintrin.h>
#define QUANTTUNE_HAS_SIEVE 1
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

#if QUANTTUNE_HAS_SIEVE
#define QUANTTUNE_AVX512 __attribute__((target("arch=x86-64-v4")))

inline const bool has_sieve =
    __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
    __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
    __builtin_cpu_supports("avx512vl");

constexpr std::uint16_t kEach = 0xFFFF;

// AVX-512 has an instruction that picks, so sixteen elements pass while they are in a register for something
// else.
template <class Bits>
class Sieve {
 public:
  Sieve(Bracket<Bits> bracket, std::uint32_t* to) : bracket_(bracket), begin_(to), to_(to) {}

  // Bit i of `wanted`: whether element i counts.
  template <class From>
  QUANTTUNE_AVX512 inline void add(const From* from, std::uint16_t wanted) {
    const Words bits = load_words(from) & kMagnitude<Bits>, low = bracket_.low + Words{};
    const __mmask16 below = _mm512_mask_cmplt_epu32_mask(wanted, __m512i(bits), __m512i(low));
    const __mmask16 inside = _mm512_mask_cmple_epu32_mask(wanted, __m512i(bits - low),
                                                          __m512i(bracket_.span + Words{}));
    below_ = Words(
        _mm512_mask_add_epi32(__m512i(below_), below, __m512i(below_), __m512i(Words{} + 1)));
    _mm512_storeu_si512(to_, _mm512_maskz_compress_epi32(inside, __m512i(bits)));
    to_ += __builtin_popcount(inside);
  }

  Picked result() const { return {std::int64_t(sum_of(below_)), to_ - begin_}; }

 private:
  Bracket<Bits> bracket_;
  Words below_{};
  std::uint32_t *begin_, *to_;
};

template <class Bits, class From>
QUANTTUNE_AVX512 Picked pick_sixteen(const From* from, std::int64_t size, Bracket<Bits> bracket,
                                     std::uint32_t* to) {
  Sieve<Bits> sieve(bracket, to);
  std::int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) sieve.add(from + i, kEach);
  Picked picked = sieve.result();
  picked.add(pick_any(from + i, size - i, bracket, to + picked.count));
  return picked;
}
#endif

// Copies the magnitudes of `from` in the bracket to `to`, which has room for all of them and a vector more.
// `from` is of Bits or Wide<Bits>, and may be `to`.
template <class Bits, class From>
Picked pick(const From* from, std::int64_t size, Bracket<Bits> bracket, Wide<Bits>* to) {
#if QUANTTUNE_HAS_SIEVE
  if constexpr (sizeof(Bits) <= 4)
    if (has_sieve) return pick_sixteen(from, size, bracket, to);
#endif
  return pick_any(from, size, bracket, to);
}

}  // namespace quanttune
