// From numbers to the codes of a grid: what fake quantization and the search for its range share.

#pragma once

#include "simd.h"

namespace quanttune {

// The next `count` elements as float32; lanes beyond them are 0.
template <class T>
QUANTTUNE_INLINE Floats load_some(const T* x, std::int64_t count) {
  T values[kLanes] = {};
  std::memcpy(values, x, count * sizeof(T));
  return convert<Floats>(load(values));
}

struct Bounds {
  float low, high;
};

// A Number is a float, or Floats.

// Ties to even for |x| < 2^22: 1.5 * 2^23 leaves a float no fraction bits. The result is never -0.
template <class Number>
QUANTTUNE_INLINE Number round_half_even(Number x) {
  const Number to_integer = Number{} + 12582912.0f;
  return (x + to_integer) - to_integer;
}

// NaN fails both comparisons, and stays.
template <class Number>
QUANTTUNE_INLINE Number clamp(Number x, float low, float high) {
  x = x < low ? Number{} + low : x;
  return x > high ? Number{} + high : x;
}

template <class Number>
QUANTTUNE_INLINE Number code_of(Number x, Number step, Bounds bounds) {
  return round_half_even(clamp(x / step, bounds.low, bounds.high));
}

}  // namespace quanttune
