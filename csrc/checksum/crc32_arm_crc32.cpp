// The CRC-32 instructions of ARMv8: for CPUs without PMULL. An instruction waits for the one
// before, so three stretches of a block are read side by side and their CRCs combined.
#include "checksum/crc32_variants.h"

#if defined(SDIO_CRC32_ARM)

#include <cstring>

#include "checksum/crc32_copy_in_blocks.h"
#include "checksum/crc32_polynomial.h"

#if defined(__clang__)
// Older versions declare __crc32d only where the whole file is compiled for the extension.
#define SDIO_TARGET_CRC32 __attribute__((target("crc")))
#define SDIO_CRC32B __builtin_arm_crc32b
#define SDIO_CRC32D __builtin_arm_crc32d
#else
#include <arm_acle.h>
#define SDIO_TARGET_CRC32 __attribute__((target("+crc")))
#define SDIO_CRC32B __crc32b
#define SDIO_CRC32D __crc32d
#endif

namespace sdio {
namespace internal {
namespace {

constexpr size_t kStretchNbytes = 4096;
static_assert(kCopyBlockNbytes % (3 * kStretchNbytes) == 0, "a copied block is read in stretches");

inline uint64_t load64(const uint8_t* p) noexcept {
  uint64_t value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

}  // namespace

SDIO_TARGET_CRC32 uint32_t extend_armv8_crc32(uint32_t crc, const void* data, size_t nbytes) noexcept {
  constexpr uint32_t kOverOne = power_of_x(8 * kStretchNbytes);
  constexpr uint32_t kOverTwo = power_of_x(16 * kStretchNbytes);
  const auto* p = static_cast<const uint8_t*>(data);
  uint32_t state = ~crc;
  for (; nbytes >= 3 * kStretchNbytes; nbytes -= 3 * kStretchNbytes, p += 3 * kStretchNbytes) {
    uint32_t second = 0;
    uint32_t third = 0;
    for (size_t i = 0; i < kStretchNbytes; i += 8) {
      state = SDIO_CRC32D(state, load64(p + i));
      second = SDIO_CRC32D(second, load64(p + kStretchNbytes + i));
      third = SDIO_CRC32D(third, load64(p + 2 * kStretchNbytes + i));
    }
    state = multiply_mod_p(state, kOverTwo) ^ multiply_mod_p(second, kOverOne) ^ third;
  }
  for (; nbytes >= 8; nbytes -= 8, p += 8) state = SDIO_CRC32D(state, load64(p));
  for (; nbytes > 0; --nbytes, ++p) state = SDIO_CRC32B(state, *p);
  return ~state;
}

uint32_t copy_armv8_crc32(uint32_t crc, void* dst, const void* src, size_t nbytes) noexcept {
  return copy_in_blocks<extend_armv8_crc32>(crc, dst, src, nbytes);
}

}  // namespace internal
}  // namespace sdio

#endif  // SDIO_CRC32_ARM
