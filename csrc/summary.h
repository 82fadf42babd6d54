// What one read of a chunk tells of it: its moments, and what lies near the median of its part of the sample.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "glimpse.h"
#include "moments.h"
#include "sampling.h"
#include "sieve.h"

namespace quanttune {

// What one chunk of a row knows.
struct Partial {
  Moments moments;
  Picked picked;  // of its part of the sample
};

// One row: where it is, and what its chunks tell.
template <class T>
struct Row {
  using Bits = typename Traits<T>::Bits;

  const T* x;
  Geometry geometry;
  const Sample* sample;
  const Glimpse<T>& glimpse;
  Partial* partials;
  Wide<Bits>* picked;  // of chunk i from i * room on
  std::int64_t room;

  const Bits* bits(std::int64_t at) const { return reinterpret_cast<const Bits*>(x + at); }
};

template <class T>
QUANTTUNE_INLINE Picked pick_piece(const Row<T>& row, std::int64_t begin, std::int64_t size,
                                   Wide<typename Traits<T>::Bits>* to) {
  using Bits = typename Traits<T>::Bits;
  if (!row.sample) return pick(row.bits(begin), size, row.glimpse.bracket, to);
  Bits gathered[Geometry::kPiece / 2];
  const std::int64_t count = row.sample->gather(row.geometry, row.x, begin, gathered);
  return pick(gathered, count, row.glimpse.bracket, to);
}

// Sums up each piece, then picks out of its part of the sample what is near the median.
template <class T>
QUANTTUNE_CLONES void summarize_in_turns(const Row<T>& row, std::int64_t index) {
  const Geometry& geometry = row.geometry;
  Wide<typename Traits<T>::Bits>* picked = row.picked + index * row.room;
  Partial partial;
  MomentSums<typename Traits<T>::Vector> sums(row.glimpse.pivot);
  const std::int64_t start = index * geometry.chunk, end = start + geometry.length(index);
  for (std::int64_t begin = start; begin < end; begin += geometry.piece) {
    const std::int64_t size = std::min(geometry.piece, end - begin);
    sums.add(row.x + begin, size, geometry.piece);
    partial.picked.add(pick_piece(row, begin, size, picked + partial.picked.count));
  }
  partial.moments = sums.result();
  row.partials[index] = partial;
}

#if QUANTTUNE_HAS_SIEVE
// A bit for each element of a piece: whether it counts for the median.
class Wanted {
 public:
  explicit Wanted(const Geometry& row, const Sample* sample) : row_(row), sample_(sample) {
    std::fill(some_, some_ + kWords, kEach);
  }

  // Of the piece that starts at `begin`.
  const std::uint16_t* masks(std::int64_t begin) {
    if (!sample_) return some_;
    const std::uint16_t* masks = sample_->masks(row_, begin);
    const std::int64_t count = row_.samples * row_.stride - begin;
    if (count >= row_.piece) return masks;
    // the last stratum is cut off
    for (std::int64_t i = 0; i < kWords; ++i) {
      const std::int64_t left = count - i * kLanes;
      some_[i] = left <= 0 ? 0 : left >= kLanes ? masks[i] : masks[i] & (kEach >> (kLanes - left));
    }
    return some_;
  }

 private:
  static constexpr std::int64_t kWords = (Geometry::kPiece + Sample::kMasked) / kLanes + 1;

  const Geometry& row_;
  const Sample* sample_;
  std::uint16_t some_[kWords];
};

// Passes on to the sieve what is summed up.
template <class T>
struct Visit {
  using Bits = typename Traits<T>::Bits;

  QUANTTUNE_AVX512 inline void operator()(const T* from) {
    const Bits* bits = reinterpret_cast<const Bits*>(from);
    const std::int64_t word = (from - piece) / kLanes;
    sieve.add(bits, wanted[word]);
    sieve.add(bits + kLanes, wanted[word + 1]);
  }

  Sieve<Bits> sieve;
  const T* piece;
  const std::uint16_t* wanted;
};

// The same in one go, which is faster unless strata are wide.
template <class T>
QUANTTUNE_AVX512 __attribute__((flatten)) void summarize_at_once(const Row<T>& row,
                                                                 std::int64_t index) {
  using Bits = typename Traits<T>::Bits;
  const Geometry& geometry = row.geometry;
  Partial partial;
  MomentSums<typename Traits<T>::Vector> sums(row.glimpse.pivot);
  Visit<T> visit{{row.glimpse.bracket, row.picked + index * row.room}, nullptr, nullptr};
  Wanted wanted(geometry, row.sample);
  const std::int64_t start = index * geometry.chunk, end = start + geometry.length(index);
  for (std::int64_t begin = start; begin < end; begin += geometry.piece) {
    const std::int64_t size = std::min(geometry.piece, end - begin);
    visit.piece = row.x + begin;
    visit.wanted = wanted.masks(begin);
    std::int64_t i = sums.add(row.x + begin, size, geometry.piece, visit);
    for (; i < size; i += kLanes) {
      const std::int64_t count = std::min(kLanes, size - i);
      Bits rest[kLanes] = {};
      std::memcpy(rest, row.x + begin + i, count * sizeof(T));
      visit.sieve.add(rest, visit.wanted[i / kLanes] & (kEach >> (kLanes - count)));
    }
  }
  partial.picked = visit.sieve.result();
  partial.moments = sums.result();
  row.partials[index] = partial;
}
#endif

template <class T>
void summarize(const Row<T>& row, std::int64_t chunk) {
#if QUANTTUNE_HAS_SIEVE
  if constexpr (sizeof(T) <= 4)
    if (has_sieve && (!row.sample || row.sample->masks(row.geometry, 0)))
      return summarize_at_once(row, chunk);
#endif
  summarize_in_turns(row, chunk);
}

}  // namespace quanttune
