// The SHA-256 instructions of ARMv8's cryptography extension: one makes four rounds.
#include "checksum/sha256_variants.h"

#if defined(SDIO_SHA256_ARM)

#include <arm_neon.h>

#if defined(__clang__)
#define SDIO_TARGET_SHA2 __attribute__((target("sha2")))
#else
#define SDIO_TARGET_SHA2 __attribute__((target("+crypto")))
#endif

namespace sdio {
namespace internal {

SDIO_TARGET_SHA2 void sha256_armv8_sha2(uint32_t* state, const uint8_t* blocks, size_t num_blocks) noexcept {
  uint32x4_t abcd = vld1q_u32(state), efgh = vld1q_u32(state + 4);
  for (; num_blocks != 0; --num_blocks, blocks += 64) {
    const uint32x4_t abcd_before = abcd, efgh_before = efgh;
    uint32x4_t w[4];
    for (int i = 0; i < 4; ++i) w[i] = vreinterpretq_u32_u8(vrev32q_u8(vld1q_u8(blocks + 16 * i)));
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      const uint32x4_t sum = vaddq_u32(w[i % 4], vld1q_u32(kSha256Constants + 4 * i));
      if (i < 12) {
        w[i % 4] = vsha256su1q_u32(vsha256su0q_u32(w[i % 4], w[(i + 1) % 4]), w[(i + 2) % 4], w[(i + 3) % 4]);
      }
      const uint32x4_t abcd_now = abcd;
      abcd = vsha256hq_u32(abcd, efgh, sum);
      efgh = vsha256h2q_u32(efgh, abcd_now, sum);
    }
    abcd = vaddq_u32(abcd, abcd_before);
    efgh = vaddq_u32(efgh, efgh_before);
  }
  vst1q_u32(state, abcd);
  vst1q_u32(state + 4, efgh);
}

}  // namespace internal
}  // namespace sdio

#endif  // SDIO_SHA256_ARM
