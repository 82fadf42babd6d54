// How a row is taken apart: into chunks, which are tasks, and into the strata of its sample.

#pragma once

#include <algorithm>
#include <cstdint>

#include "simd.h"

namespace quanttune {

constexpr std::int64_t kSampleSize = 65536;

// The elements of a row whose median stands for the row's. See reference.sample_positions.
class Sample {
 public:
  Sample(std::int64_t size, bool exact)
      : stride_(exact ? 1 : (size + kSampleSize - 1) / kSampleSize), count_(size / stride_) {}
  Sample(std::int64_t count, std::int64_t stride) : stride_(stride), count_(count) {}

  std::int64_t count() const { return count_; }
  std::int64_t stride() const { return stride_; }
  bool is_whole_row() const { return stride_ == 1; }

  // Calls body(stratum, position) for each stratum in [begin, end), which begins with a stratum.
  template <class Body>
  QUANTTUNE_INLINE void for_positions(std::int64_t begin, std::int64_t end, Body body) const {
    std::int64_t stratum = begin / stride_;
    const std::int64_t last = std::min(end / stride_, count_);
    // by way of memory: taking lanes out of a vector one by one costs more than all the rest
    std::uint32_t offsets[kBatch];
    while (stride_ <= 65536 && stratum + kLanes <= last) {
      const auto stride = std::uint32_t(stride_);
      const std::int64_t batch = std::min((last - stratum) / kLanes * kLanes, kBatch);
      for (std::int64_t i = 0; i < batch; i += kLanes) {
        const Words order = kOrder + std::uint32_t(i);
        const Words offset = order * stride + pick(order + std::uint32_t(stratum), stride);
        std::memcpy(offsets + i, &offset, sizeof(offset));
      }
      for (std::int64_t i = 0; i < batch; ++i) body(stratum + i, stratum * stride_ + offsets[i]);
      stratum += batch;
    }
    for (; stratum < last; ++stratum) body(stratum, stratum * stride_ + pick_one(stratum));
  }

 private:
  static constexpr std::int64_t kBatch = 256;
  static constexpr Words kOrder = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

  template <class Integer>
  static QUANTTUNE_INLINE Integer mix(Integer stratum) {
    Integer mixed = stratum * 0x9E3779B1u;
    mixed = (mixed ^ (mixed >> 16)) * 0x7FEB352Du;
    mixed = (mixed ^ (mixed >> 15)) * 0x846CA68Bu;
    return mixed ^ (mixed >> 16);
  }

  // (mixed * stride) >> 32, in halves, since a lane has 32 bits; that takes a stride of at most 2^16
  static QUANTTUNE_INLINE Words pick(Words strata, std::uint32_t stride) {
    const Words mixed = mix(strata);
    return ((mixed >> 16) * stride + (((mixed & 0xFFFFu) * stride) >> 16)) >> 16;
  }

  std::int64_t pick_one(std::int64_t stratum) const {
    return std::int64_t((std::uint64_t(mix(std::uint32_t(stratum))) * std::uint64_t(stride_)) >> 32);
  }

  std::int64_t stride_, count_;
};

// A row in chunks. They depend on its size alone, so any number of threads gives the same bits.
struct Geometry {
  static constexpr std::int64_t kPiece = 1 << 11, kChunk = 1 << 14;  // elements, at least
  std::int64_t size, chunk, chunks;
  std::int64_t piece;  // fits a first-level cache, and holds whole vectors of strata
  Sample sample;

  Geometry(std::int64_t size, bool exact) : size(size), sample(size, exact) {
    piece = round_up(kPiece, kLanes * sample.stride());
    chunk = round_up(kChunk, piece);
    chunks = (size + chunk - 1) / chunk;
  }
  std::int64_t length(std::int64_t index) const { return std::min(chunk, size - index * chunk); }

 private:
  static std::int64_t round_up(std::int64_t size, std::int64_t step) {
    return (size + step - 1) / step * step;
  }
};

}  // namespace quanttune
