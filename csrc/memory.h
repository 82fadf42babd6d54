// Fresh memory: the kernel clears a page at the first write to it, and a page of 2 MiB costs far less
// than 512 small ones. Large results are always fresh, since malloc gives theirs back at once.

#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace quanttune {

// Asks for large pages where they fit into [address, address + bytes). A machine without them ignores it.
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
