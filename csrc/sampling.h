// How a row is taken apart: into chunks, which are tasks, into pieces, and into the strata of its sample.

#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

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
      : Geometry(size, exact ? 1 : (size + kSampleSize - 1) / kSampleSize, 0) {}

  // Of the part of such a row that is no padding, and that counts if it has a stratum.
  Geometry part(std::int64_t length) const { return {length < stride ? 0 : length, stride, 0}; }

  bool is_sampled() const { return stride > 1; }
  std::int64_t words() const { return (piece + kLanes - 1) / kLanes; }  // of sixteen elements, per piece
  std::int64_t length(std::int64_t index) const { return std::min(chunk, size - index * chunk); }

 private:
  Geometry(std::int64_t size, std::int64_t stride, int)
      : size(size),
        stride(stride),
        samples(size / stride),
        piece(round_up(kPiece, stride)),
        chunk(round_up(kChunk, piece)),
        chunks((size + chunk - 1) / chunk) {}

  static std::int64_t round_up(std::int64_t size, std::int64_t step) {
    return (size + step - 1) / step * step;
  }
};

// Where the sampled elements are. Hashing them costs as much as summing up a row, so the latest are kept.
class Sample {
 public:
  static constexpr std::int64_t kMasked = 4;  // the widest strata that have masks

  // Null where a row is not sampled. Good until the thread's next call.
  static const Sample* of(const Geometry& row) {
    static thread_local std::vector<std::unique_ptr<const Sample>> kept;  // the latest first
    constexpr std::size_t kKept = 16;  // of half a MiB at most
    if (!row.is_sampled()) return nullptr;
    const auto is_it = [&](const auto& sample) { return sample->stride_ == row.stride; };
    auto found = std::find_if(kept.begin(), kept.end(), is_it);
    if (found == kept.end()) {
      if (kept.size() == kKept) kept.pop_back();
      found = kept.insert(kept.end(), std::unique_ptr<const Sample>(new Sample(row)));
    }
    std::rotate(kept.begin(), found, found + 1);
    return kept.front().get();
  }

  // Calls body(position) for the sampled elements of the piece that starts at `begin`.
  template <class Body>
  QUANTTUNE_INLINE void for_piece(const Geometry& row, std::int64_t begin, Body body) const {
    const std::uint32_t* offsets = offsets_.get() + begin / stride_;
    for (std::int64_t i = 0; i < count(row, begin); ++i) body(begin + offsets[i]);
  }

  // Copies their bits to `to`, and returns how many they are. All are in a near cache and memory would idle,
  // so it is asked for some of what comes after the next piece; 16-bit formats leave it less to do.
  template <class T>
  QUANTTUNE_INLINE std::int64_t gather(const Geometry& row, const T* x, std::int64_t begin,
                                       typename Traits<T>::Bits* to) const {
    constexpr std::int64_t kStep = 8;
    const T *piece = x + begin, *later = piece + 2 * row.piece;
    const std::uint32_t* offsets = offsets_.get() + begin / stride_;
    const std::int64_t samples = count(row, begin);
    const auto take = [&](std::int64_t i) QUANTTUNE_BODY {
      to[i] = bit_cast<typename Traits<T>::Bits>(piece[offsets[i]]);
    };
    std::int64_t i = 0;
    for (; i + kStep <= samples; i += kStep, later += 64 / sizeof(T)) {
      if constexpr (sizeof(T) > 2) {
        prefetch(later);
        prefetch(later + row.piece / 2);
      }
#pragma GCC unroll 8
      for (std::int64_t j = 0; j < kStep; ++j) take(i + j);
    }
    for (; i < samples; ++i) take(i);
    return samples;
  }

  // Bit j of word i tells whether element 16 i + j of a whole piece that starts at `begin` is sampled. Null
  // where the strata are so wide that looking at every element does not pay.
  const std::uint16_t* masks(const Geometry& row, std::int64_t begin) const {
    return masks_ ? masks_.get() + begin / row.piece * row.words() : nullptr;
  }

 private:
  std::int64_t count(const Geometry& row, std::int64_t begin) const {
    return std::min(per_piece_, row.samples - begin / stride_);
  }

  explicit Sample(const Geometry& row)
      : stride_(row.stride),
        per_piece_(row.piece / row.stride),
        offsets_(new std::uint32_t[kSampleSize]) {
    fill(offsets_.get(), stride_, per_piece_);
    if (stride_ > kMasked) return;
    const std::int64_t words = row.words();
    const std::int64_t pieces = (kSampleSize + per_piece_ - 1) / per_piece_;
    masks_.reset(new std::uint16_t[pieces * words]());
    for (std::int64_t stratum = 0; stratum < kSampleSize; ++stratum) {
      const std::uint32_t offset = offsets_[stratum];
      masks_[stratum / per_piece_ * words + offset / kLanes] |= 1u << (offset % kLanes);
    }
  }

  QUANTTUNE_CLONES static void fill(std::uint32_t* offsets, std::int64_t stride,
                                    std::int64_t per_piece) {
    for (std::int64_t first = 0; first < kSampleSize; first += per_piece)
      for (std::int64_t i = 0; i < std::min(per_piece, kSampleSize - first); ++i)
        offsets[first + i] =
            std::uint32_t(i * stride + pick_of_stratum(std::uint32_t(first + i), stride));
  }

  std::int64_t stride_, per_piece_;
  std::unique_ptr<std::uint32_t[]> offsets_;
  std::unique_ptr<std::uint16_t[]> masks_;
};

}  // namespace quanttune
