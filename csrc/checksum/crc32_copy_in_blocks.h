// A copy made of memcpy and a checksum, for implementations too slow for a second look at a block
// in the first-level cache to matter. Internal to checksum/.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace sdio {
namespace internal {

// Twice this (source and destination) fits a 32 KiB cache.
constexpr size_t kCopyBlockNbytes = 12 * 1024;

template <uint32_t (*Extend)(uint32_t, const void*, size_t) noexcept>
uint32_t copy_in_blocks(uint32_t crc, void* dst, const void* src, size_t nbytes) noexcept {
  auto* const to = static_cast<uint8_t*>(dst);
  const auto* const from = static_cast<const uint8_t*>(src);
  for (size_t i = 0; i < nbytes;) {
    const size_t n = std::min(kCopyBlockNbytes, nbytes - i);
    std::memcpy(to + i, from + i, n);
    crc = Extend(crc, from + i, n);
    i += n;
  }
  return crc;
}

}  // namespace internal
}  // namespace sdio
