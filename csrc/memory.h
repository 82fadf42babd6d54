// Fresh memory is not free: the kernel clears each page at the first write to it, which can take longer
// than all that is done with it.

#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace quanttune {

// Room for `size` elements, which the thread keeps for its next call unless it is very large. Of two at
// the same time, the SLOTs differ.
template <class T, int SLOT>
class Scratch {
 public:
  explicit Scratch(std::int64_t size) {
    static thread_local std::unique_ptr<T[]> kept;
    static thread_local std::int64_t kept_size = 0;
    if (size > kKept) {
      own_.reset(new T[size]);
      data_ = own_.get();
      return;
    }
    if (size > kept_size) {
      kept.reset(new T[size]);
      kept_size = size;
    }
    data_ = kept.get();
  }
  T* data() const { return data_; }

 private:
  static constexpr std::int64_t kKept = (1 << 24) / sizeof(T);
  std::unique_ptr<T[]> own_;
  T* data_;
};

// Asks for large pages where they fit into [address, address + bytes): one costs far less than 512 small
// ones. A machine without them ignores it.
inline void prefer_large_pages(std::uintptr_t address, std::size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr std::uintptr_t kPage = std::uintptr_t(1) << 21;
  const std::uintptr_t begin = (address + kPage - 1) & ~(kPage - 1);
  const std::uintptr_t end = (address + bytes) & ~(kPage - 1);
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)address, (void)bytes;
#endif
}

}  // namespace quanttune
