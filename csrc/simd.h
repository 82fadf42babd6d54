// Sixteen lanes of float, written once in the compiler's vector types and compiled for several machines.
//
// Every operation below is element-wise IEEE arithmetic on a fixed number of lanes, so AVX-512, AVX2 and
// the portable build give the same bits.

#pragma once

#include <cstdint>
#include <cstring>

#define QUANTTUNE_INLINE inline __attribute__((always_inline))
// behind the parameters of a lambda: without it the body is compiled once, for the oldest machine
#define QUANTTUNE_BODY __attribute__((always_inline))

// The loader picks the best clone for the machine it runs on. A clone covers what is inlined into it.
#if defined(__x86_64__) && defined(__linux__) && !defined(QUANTTUNE_PORTABLE)
#define QUANTTUNE_CLONES \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define QUANTTUNE_CLONES
#endif

namespace quanttune {

constexpr std::int64_t kLanes = 16;

typedef float Floats __attribute__((vector_size(kLanes * 4)));
typedef std::uint32_t Words __attribute__((vector_size(kLanes * 4)));
typedef std::int32_t Masks __attribute__((vector_size(kLanes * 4)));
typedef double Doubles __attribute__((vector_size(kLanes * 8)));
typedef std::uint64_t LongWords __attribute__((vector_size(kLanes * 8)));
typedef std::uint16_t Halves __attribute__((vector_size(kLanes * 2)));

enum class Type : int { float32, float64, float16, bfloat16 };

// The two 16-bit formats are kept as bits: `Bits` orders magnitudes like the numbers themselves.
struct Float16 {
  std::uint16_t bits;
};
struct BFloat16 {
  std::uint16_t bits;
};

template <class T>
struct Traits;
template <>
struct Traits<float> {
  using Bits = std::uint32_t;
  using Vector = Floats;
  using Scalar = float;
};
template <>
struct Traits<double> {
  using Bits = std::uint64_t;
  using Vector = Doubles;
  using Scalar = double;
};
template <>
struct Traits<Float16> {
  using Bits = std::uint16_t;
  using Vector = Floats;
  using Scalar = float;
};
template <>
struct Traits<BFloat16> {
  using Bits = std::uint16_t;
  using Vector = Floats;
  using Scalar = float;
};

template <class To, class From>
QUANTTUNE_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

template <class Vector>
QUANTTUNE_INLINE Vector load_bits(const void* from) {
  Vector vector;
  std::memcpy(&vector, from, sizeof(vector));
  return vector;
}

QUANTTUNE_INLINE Words load_words(const std::uint32_t* from) { return load_bits<Words>(from); }
QUANTTUNE_INLINE Words load_words(const std::uint16_t* from) {
  return __builtin_convertvector(load_bits<Halves>(from), Words);
}

QUANTTUNE_INLINE Floats splat(float value) { return Floats{} + value; }
QUANTTUNE_INLINE Doubles splat(double value) { return Doubles{} + value; }

// ------------------------------------------------------------------ to and from the 16-bit formats

QUANTTUNE_INLINE Floats from_bfloat16(Halves bits) {
  return bit_cast<Floats>(__builtin_convertvector(bits, Words) << 16);
}

QUANTTUNE_INLINE Floats from_float16(Halves bits) {
  const Words wide = __builtin_convertvector(bits, Words);
  const Words magnitude = (wide & 0x7FFFu) << 13;
  const Words normal = magnitude + (112u << 23);
  // a subnormal half is a fraction of 2^-14: place it under a one, then take the one away
  const Words fraction = bit_cast<Words>(bit_cast<Floats>(magnitude | (113u << 23)) - 0x1p-14f);
  const Words special = magnitude | (255u << 23);
  const Words exponent = wide & 0x7C00u;
  const Words result = exponent == 0 ? fraction : (exponent == 0x7C00u ? special : normal);
  return bit_cast<Floats>(result | ((wide & 0x8000u) << 16));
}

// The upper half of each word is the bfloat16: to nearest, ties to even. A NaN that was made of a bfloat16
// has no bits in the lower half that could carry.
QUANTTUNE_INLINE Words round_numbers_to_bfloat16(Floats value) {
  const Words bits = bit_cast<Words>(value);
  return bits + 0x7FFFu + ((bits >> 16) & 1u);
}

QUANTTUNE_INLINE Words round_to_bfloat16(Floats value) {
  const Words bits = bit_cast<Words>(value);
  return (bits & 0x7FFFFFFFu) > 0x7F800000u ? (bits | 0x400000u)  // NaN stays quiet
                                            : round_numbers_to_bfloat16(value);
}

QUANTTUNE_INLINE Halves to_bfloat16(Floats value) {
  return __builtin_convertvector(round_to_bfloat16(value) >> 16, Halves);
}

QUANTTUNE_INLINE Halves to_float16(Floats value) {
  const Words bits = bit_cast<Words>(value);
  const Words magnitude = bits & 0x7FFFFFFFu;
  const Words normal = (magnitude - (112u << 23) + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
  // below 2^-14: adding a half moves the bits that are kept to the end, and rounds them
  const Words small = bit_cast<Words>(bit_cast<Floats>(magnitude) + 0.5f) - (126u << 23);
  const Words special = magnitude > 0x7F800000u ? Words{} + 0x7E00u : Words{} + 0x7C00u;
  const Words result = magnitude < (113u << 23)    ? small
                       : magnitude >= (143u << 23) ? special
                                                   : normal;
  return __builtin_convertvector(result | ((bits >> 16) & 0x8000u), Halves);
}

// --------------------------------------------------------------------------------- sixteen elements

// Asks for the cache line at `from`: the machine does not look beyond a page of memory by itself.
QUANTTUNE_INLINE void prefetch(const void* from) { __builtin_prefetch(from); }
template <class T>
QUANTTUNE_INLINE void prefetch_page_ahead(const T* from) {
  prefetch(reinterpret_cast<const char*>(from) + 4096);
}

QUANTTUNE_INLINE Floats load(const float* from) { return load_bits<Floats>(from); }
QUANTTUNE_INLINE Doubles load(const double* from) { return load_bits<Doubles>(from); }
QUANTTUNE_INLINE Floats load(const Float16* from) { return from_float16(load_bits<Halves>(from)); }
QUANTTUNE_INLINE Floats load(const BFloat16* from) { return from_bfloat16(load_bits<Halves>(from)); }

QUANTTUNE_INLINE void store(float* to, Floats value) { std::memcpy(to, &value, sizeof(value)); }
QUANTTUNE_INLINE void store(double* to, Doubles value) { std::memcpy(to, &value, sizeof(value)); }
QUANTTUNE_INLINE void store(Float16* to, Floats value) {
  const Halves bits = to_float16(value);
  std::memcpy(to, &bits, sizeof(bits));
}
QUANTTUNE_INLINE void store(BFloat16* to, Floats value) {
  const Halves bits = to_bfloat16(value);
  std::memcpy(to, &bits, sizeof(bits));
}

// 2 * kLanes elements. Those of BFloat16 come in an order of their own, the even ones and the odd ones: a
// shift and a mask take them apart, and a mask puts them together.
template <class T>
struct Pair {
  typename Traits<T>::Vector first, second;
};

template <class T>
QUANTTUNE_INLINE Pair<T> load_pair(const T* from) {
  return {load(from), load(from + kLanes)};
}
QUANTTUNE_INLINE Pair<BFloat16> load_pair(const BFloat16* from) {
  const Words both = load_bits<Words>(from);
  return {bit_cast<Floats>(both << 16), bit_cast<Floats>(both & 0xFFFF0000u)};
}

template <class T>
QUANTTUNE_INLINE void store_pair(T* to, const Pair<T>& pair) {
  store(to, pair.first);
  store(to + kLanes, pair.second);
}
QUANTTUNE_INLINE void store_pair(BFloat16* to, const Pair<BFloat16>& pair) {
  const Words both =
      (round_to_bfloat16(pair.first) >> 16) | (round_to_bfloat16(pair.second) & 0xFFFF0000u);
  std::memcpy(to, &both, sizeof(both));
}

// The same for what was computed, one by one, from elements of T and finite numbers.
template <class T>
QUANTTUNE_INLINE void store_mapped_pair(T* to, const Pair<T>& pair) {
  store_pair(to, pair);
}
QUANTTUNE_INLINE void store_mapped_pair(BFloat16* to, const Pair<BFloat16>& pair) {
  const Words both = (round_numbers_to_bfloat16(pair.first) >> 16) |
                     (round_numbers_to_bfloat16(pair.second) & 0xFFFF0000u);
  std::memcpy(to, &both, sizeof(both));
}

template <class To, class From>
QUANTTUNE_INLINE To convert(From value) {
  return __builtin_convertvector(value, To);
}

template <class Vector>
QUANTTUNE_INLINE double sum_of(const Vector& lanes) {
  double sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
  return sum;
}

// The bits of |value|, which are ordered like it.
QUANTTUNE_INLINE Words magnitude_bits(Floats value) { return bit_cast<Words>(value) & 0x7FFFFFFFu; }
QUANTTUNE_INLINE LongWords magnitude_bits(Doubles value) {
  return bit_cast<LongWords>(value) & 0x7FFFFFFFFFFFFFFFu;
}

template <class Vector>
QUANTTUNE_INLINE Vector magnitude(Vector value) {
  return bit_cast<Vector>(magnitude_bits(value));
}

inline double to_double(float value) { return value; }
inline double to_double(double value) { return value; }
template <class T>
double to_double(T value) {
  const T lanes[kLanes] = {value};
  return load(lanes)[0];
}

// The bits of a number that T represents exactly.
template <class T>
typename Traits<T>::Bits bits_of(typename Traits<T>::Scalar value) {
  T lanes[kLanes];
  store(lanes, splat(value));
  return bit_cast<typename Traits<T>::Bits>(lanes[0]);
}

// Calls body(T{}) with the element type that `type` names.
template <class Body>
void dispatch(Type type, Body body) {
  switch (type) {
    case Type::float32: return body(float{});
    case Type::float64: return body(double{});
    case Type::float16: return body(Float16{});
    case Type::bfloat16: return body(BFloat16{});
  }
}

// Calls body(offset, count): count is kLanes, but for the last call of a size that is no multiple of it.
template <class Body>
QUANTTUNE_INLINE void for_lanes(std::int64_t size, Body body) {
  std::int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) body(i, kLanes);
  if (i < size) body(i, size - i);
}

}  // namespace quanttune
