// How a row is taken apart: into chunks, which are tasks, into pieces, and into the strata of its sample.

#pragma once

#include <algorithm>
#include <cstdint>

#include "memory.h"
#include "simd.h"

namespace quanttune {

constexpr std::int64_t kSampleSize = 65536;

// Which element of a stratum of `stride` elements is sampled. See reference.sample_positions.
QUANTTUNE_INLINE std::int64_t pick_of_stratum(std::uint32_t stratum, std::int64_t stride) {
  std::uint32_t mixed = stratum * 0x9E3779B1u;
  mixed = (mixed ^ (mixed >> 16)) * 0x7FEB352Du;
  mixed = (mixed ^ (mixed >> 15)) * 0x846CA68Bu;
  mixed ^= mixed >> 16;
  return std::int64_t((std::uint64_t(mixed) * std::uint64_t(stride)) >> 32);
}

// All of this depends on the row's size alone, so any number of threads gives the same bits.
struct Geometry {
  static constexpr std::int64_t kPiece = 1 << 11, kChunk = 1 << 14;  // elements, at least
  std::int64_t size, stride, samples;
  std::int64_t piece;  // elements; fits a first-level cache, and is a whole number of strata
  std::int64_t chunk, chunks;

  Geometry(std::int64_t size, bool exact)
      : size(size),
        stride(exact ? 1 : (size + kSampleSize - 1) / kSampleSize),
        samples(size / stride),
        piece(round_up(kPiece, stride)),
        chunk(round_up(kChunk, piece)),
        chunks((size + chunk - 1) / chunk) {}

  bool is_sampled() const { return stride > 1; }
  std::int64_t length(std::int64_t index) const { return std::min(chunk, size - index * chunk); }

 private:
  static std::int64_t round_up(std::int64_t size, std::int64_t step) {
    return (size + step - 1) / step * step;
  }
};

// Where the sampled elements are, counted from the start of their piece. Made once per size and thread.
class SampleTable {
 public:
  explicit SampleTable(const Geometry& row) : per_piece_(row.piece / row.stride), row_(row) {
    static thread_local std::int64_t kept_stride = 0;
    static thread_local std::unique_ptr<std::uint32_t[]> kept;
    if (!row.is_sampled()) return;
    if (!kept) kept.reset(new std::uint32_t[kSampleSize]);
    if (kept_stride != row.stride) fill(kept.get(), row.stride, per_piece_);
    kept_stride = row.stride;
    offsets_ = kept.get();
  }

  // Calls body(position) for the sampled elements of the piece that starts at `begin`.
  template <class Body>
  QUANTTUNE_INLINE void for_piece(std::int64_t begin, Body body) const {
    const std::int64_t first = begin / row_.stride;
    const std::int64_t count = std::min(per_piece_, row_.samples - first);
    const std::uint32_t* offsets = offsets_ + first;
    for (std::int64_t i = 0; i < count; ++i) body(begin + offsets[i]);
  }

  // Copies their bits to `to`, and returns how many they are.
  template <class T>
  QUANTTUNE_INLINE std::int64_t gather(const T* row, std::int64_t begin,
                                       typename Traits<T>::Bits* to) const {
    std::int64_t count = 0;
    for_piece(begin, [&](std::int64_t position) QUANTTUNE_BODY {
      to[count++] = bit_cast<typename Traits<T>::Bits>(row[position]);
    });
    return count;
  }

 private:
  QUANTTUNE_CLONES static void fill(std::uint32_t* offsets, std::int64_t stride, std::int64_t per_piece) {
    for (std::int64_t first = 0; first < kSampleSize; first += per_piece)
      for (std::int64_t i = 0; i < std::min(per_piece, kSampleSize - first); ++i)
        offsets[first + i] =
            std::uint32_t(i * stride + pick_of_stratum(std::uint32_t(first + i), stride));
  }

  std::int64_t per_piece_;
  const Geometry& row_;
  const std::uint32_t* offsets_ = nullptr;
};

}  // namespace quanttune
