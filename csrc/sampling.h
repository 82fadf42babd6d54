// The elements of a row whose median stands for the row's. See reference.sample_positions.

#pragma once

#include <cstdint>

namespace quanttune {

constexpr std::int64_t kSampleSize = 65536;

class Sample {
 public:
  Sample(std::int64_t size, bool exact)
      : stride_(exact ? 1 : (size + kSampleSize - 1) / kSampleSize), count_(size / stride_) {}

  std::int64_t count() const { return count_; }
  bool is_whole_row() const { return stride_ == 1; }

  // Calls body(stratum, position) for every sampled position in [begin, end).
  template <class Body>
  void for_positions(std::int64_t begin, std::int64_t end, Body body) const {
    std::int64_t stratum = begin / stride_;
    const std::int64_t last = end / stride_ < count_ ? end / stride_ + 1 : count_;
    for (; stratum < last; ++stratum) {
      const std::int64_t position = stratum * stride_ + pick(stratum);
      if (position >= begin && position < end) body(stratum, position);
    }
  }

 private:
  std::int64_t pick(std::int64_t stratum) const {
    std::uint32_t mixed = static_cast<std::uint32_t>(stratum) * 0x9E3779B1u;
    mixed = (mixed ^ (mixed >> 16)) * 0x7FEB352Du;
    mixed = (mixed ^ (mixed >> 15)) * 0x846CA68Bu;
    mixed ^= mixed >> 16;
    return static_cast<std::int64_t>((std::uint64_t(mixed) * std::uint64_t(stride_)) >> 32);
  }

  std::int64_t stride_, count_;
};

}  // namespace quanttune
