// Sums over a row about a pivot near its mean, in the precision of its elements where that is enough.

#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "simd.h"

namespace quanttune {

struct Moments {
  double sum = 0, squares = 0;  // of x - pivot
  double maximum = 0;           // of |x|

  void add(const Moments& other) {
    sum += other.sum;
    squares += other.squares;
    maximum = std::max(maximum, other.maximum);
  }

  // Sum of (x - mean)^2 of `size` elements. A pivot near the mean costs two bits at most, see `is_precise`.
  double centred(std::int64_t size) const { return squares - sum * (sum / double(size)); }

  // Squares of floats can be too large or too small for a float, and a pivot far from the mean would cost
  // digits. False for NaN and inf.
  bool is_precise(std::int64_t size) const {
    return maximum < 0x1p56 && centred(size) >= double(size) * 0x1p-100 &&
           centred(size) >= 0.25 * squares;
  }
};

// Lanes of such sums: in the precision of Vector over a block, in float64 over blocks.
template <class Vector>
class MomentSums {
  using Scalar = std::decay_t<decltype(Vector{}[0])>;
  using Bits = decltype(magnitude_bits(Vector{}));

 public:
  static constexpr std::int64_t kStep = 2 * kLanes;

  QUANTTUNE_INLINE explicit MomentSums(Scalar pivot) : pivot_(pivot) {}

  // Both halves of x at a time, because the machine looks ahead within a page of memory only, but in several;
  // `ahead` elements further it is asked for what comes next. Calls visit(p) for each kStep elements at p.
  // Returns how many elements were visited; the rest is not.
  template <class T, class Visit>
  QUANTTUNE_INLINE std::int64_t add(const T* x, std::int64_t size, std::int64_t ahead,
                                    Visit& visit) {
    const std::int64_t half = size / (2 * kStep) * kStep;
    std::int64_t begin = 0;
    for (; begin + kBlock < half; begin += kBlock) add_block(x + begin, half, kBlock, ahead, visit);
    add_block(x + begin, half, half - begin, ahead, visit);
    add_rest(x + 2 * half, size - 2 * half);
    return 2 * half;
  }

  template <class T>
  QUANTTUNE_INLINE void add(const T* x, std::int64_t size, std::int64_t ahead = 0) {
    const auto none = [](const T*) QUANTTUNE_BODY {};
    add(x, size, ahead, none);
  }

  QUANTTUNE_INLINE Moments result() const {
    Moments all;
    for (int lane = 0; lane < kLanes; ++lane)
      all.add({sum_[lane], squares_[lane], double(bit_cast<Scalar>(maximum_[lane]))});
    return all;
  }

 private:
  // of each half: a lane adds 16 numbers, which costs 8 roundings
  static constexpr std::int64_t kBlock = 512;

  // Four streams, so that additions do not wait for each other.
  struct Stream {
    Vector sum{}, squares{};
    Bits peak{};

    QUANTTUNE_INLINE void add(Vector value, Scalar pivot) {
      const Vector shifted = value - pivot;
      const Bits bits = magnitude_bits(value);
      peak = bits > peak ? bits : peak;
      sum += shifted;
      squares += shifted * shifted;
    }
  };

  QUANTTUNE_INLINE void keep(const Stream& stream) {
    sum_ += convert<Doubles>(stream.sum);
    squares_ += convert<Doubles>(stream.squares);
    maximum_ = stream.peak > maximum_ ? stream.peak : maximum_;
  }

  QUANTTUNE_INLINE static Stream join(const Stream& one, const Stream& other) {
    return {one.sum + other.sum, one.squares + other.squares,
            one.peak > other.peak ? one.peak : other.peak};
  }

  template <class T, class Visit>
  QUANTTUNE_INLINE void add_block(const T* x, std::int64_t half, std::int64_t size,
                                  std::int64_t ahead, Visit& visit) {
    Stream streams[4];
    for (std::int64_t i = 0; i < size; i += kStep)
      for (int side = 0; side < 2; ++side) {
        const T* from = x + i + side * half;
        for (int line = 0; line < kStep * int(sizeof(T)); line += 64)
          prefetch(reinterpret_cast<const char*>(from + ahead) + line);
        const Pair<T> pair = load_pair(from);
        streams[2 * side].add(convert<Vector>(pair.first), pivot_);
        streams[2 * side + 1].add(convert<Vector>(pair.second), pivot_);
        visit(from);
      }
    keep(join(join(streams[0], streams[1]), join(streams[2], streams[3])));
  }

  template <class T>
  QUANTTUNE_INLINE void add_rest(const T* x, std::int64_t size) {
    Stream stream;
    std::int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) stream.add(convert<Vector>(load(x + i)), pivot_);
    if (i < size) {
      T rest[kLanes] = {};
      std::memcpy(rest, x + i, (size - i) * sizeof(T));
      Vector values = convert<Vector>(load(rest));
      for (std::int64_t lane = size - i; lane < kLanes; ++lane) values[lane] = pivot_;
      Stream last;
      last.add(values, pivot_);
      for (std::int64_t lane = size - i; lane < kLanes; ++lane) last.peak[lane] = 0;
      stream = join(stream, last);
    }
    keep(stream);
  }

  Scalar pivot_;
  Doubles sum_{}, squares_{};
  Bits maximum_{};
};

}  // namespace quanttune
