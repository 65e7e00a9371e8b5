// PMULL, the carry-less multiply of ARMv8's cryptography extension: the folding of
// crc32_polynomial.h on 128-bit registers. Eight accumulators hide the multiply's latency.
#include "checksum/crc32_variants.h"

#if defined(SDIO_CRC32_ARM)

#include <arm_neon.h>

#include "checksum/crc32_polynomial.h"

#define SDIO_ALWAYS_INLINE inline __attribute__((always_inline))
#if defined(__clang__)
#define SDIO_TARGET_PMULL __attribute__((target("aes")))
#else
#define SDIO_TARGET_PMULL __attribute__((target("+crypto")))
#endif

namespace sdio {
namespace internal {
namespace {

SDIO_TARGET_PMULL SDIO_ALWAYS_INLINE uint8x16_t multiply(uint64_t a, uint64_t b) noexcept {
#if defined(__clang__)
  // Older versions declare vmull_p64 only where the whole file is compiled for the extension.
  return vreinterpretq_u8_p128(__builtin_neon_vmull_p64(a, b));
#else
  return vreinterpretq_u8_p128(vmull_p64(a, b));
#endif
}

SDIO_TARGET_PMULL SDIO_ALWAYS_INLINE uint64_t lo_half(uint8x16_t v) noexcept {
  return vgetq_lane_u64(vreinterpretq_u64_u8(v), 0);
}

SDIO_TARGET_PMULL SDIO_ALWAYS_INLINE uint64_t hi_half(uint8x16_t v) noexcept {
  return vgetq_lane_u64(vreinterpretq_u64_u8(v), 1);
}

template <bool kCopy>
SDIO_TARGET_PMULL SDIO_ALWAYS_INLINE uint8x16_t load128(uint8_t* dst, const uint8_t* src, size_t offset) noexcept {
  const uint8x16_t bytes = vld1q_u8(src + offset);
  if constexpr (kCopy) {
    vst1q_u8(dst + offset, bytes);
  } else {
    static_cast<void>(dst);
  }
  return bytes;
}

SDIO_TARGET_PMULL SDIO_ALWAYS_INLINE uint8x16_t fold128(uint8x16_t v, FoldingPair constants, uint8x16_t next) noexcept {
  const uint8x16_t lo = multiply(lo_half(v), constants.lo);
  const uint8x16_t hi = multiply(hi_half(v), constants.hi);
  return veorq_u8(veorq_u8(lo, hi), next);
}

template <bool kCopy>
SDIO_TARGET_PMULL SDIO_ALWAYS_INLINE uint32_t finish128(uint8x16_t v, uint8_t* dst, const uint8_t* src, size_t offset,
                                                        size_t nbytes) noexcept {
  constexpr FoldingPair kBy128 = folding_pair(128);
  for (; nbytes - offset >= 16; offset += 16) {
    v = fold128(v, kBy128, load128<kCopy>(dst, src, offset));
  }
  const size_t rest = nbytes - offset;
  if (rest != 0) {
    // v and the last bytes make two registers, the first with leading zero bytes. A look-up past
    // the end of the table gives zero: that clears what is moved in.
    static constexpr uint8_t kIota[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const uint8x16_t iota = vld1q_u8(kIota);
    const uint8x16_t to_front = vaddq_u8(iota, vdupq_n_u8(static_cast<uint8_t>(rest)));
    const uint8x16_t to_end = vsubq_u8(to_front, vdupq_n_u8(16));
    const uint8x16_t is_new = vcgeq_u8(to_front, vdupq_n_u8(16));
    const uint8x16_t last = load128<kCopy>(dst, src, nbytes - 16);
    const uint8x16_t second = vbslq_u8(is_new, last, vqtbl1q_u8(v, to_front));
    v = fold128(vqtbl1q_u8(v, to_end), kBy128, second);
  }
  const uint8x16_t hi_first = vextq_u8(v, vdupq_n_u8(0), 8);
  const uint8x16_t t = veorq_u8(multiply(lo_half(v), kReduceTo96), hi_first);
  const uint64_t q = lo_half(multiply(lo_half(t), kBarrettQuotient));
  const uint8x16_t remainder = veorq_u8(t, multiply(q, kBarrettPolynomial));
  return ~static_cast<uint32_t>(hi_half(remainder));
}

template <bool kCopy>
SDIO_TARGET_PMULL uint32_t run(uint32_t crc, uint8_t* dst, const uint8_t* src, size_t nbytes) noexcept {
  const uint32x4_t initial = vsetq_lane_u32(~crc, vdupq_n_u32(0), 0);
  uint8x16_t v0 = veorq_u8(load128<kCopy>(dst, src, 0), vreinterpretq_u8_u32(initial));
  size_t i = 16;
  if (nbytes >= 128) {
    constexpr FoldingPair kBy1024 = folding_pair(1024), kBy512 = folding_pair(512), kBy256 = folding_pair(256),
                          kBy128 = folding_pair(128);
    uint8x16_t v1 = load128<kCopy>(dst, src, 16);
    uint8x16_t v2 = load128<kCopy>(dst, src, 32);
    uint8x16_t v3 = load128<kCopy>(dst, src, 48);
    uint8x16_t v4 = load128<kCopy>(dst, src, 64);
    uint8x16_t v5 = load128<kCopy>(dst, src, 80);
    uint8x16_t v6 = load128<kCopy>(dst, src, 96);
    uint8x16_t v7 = load128<kCopy>(dst, src, 112);
    for (i = 128; nbytes - i >= 128; i += 128) {
      v0 = fold128(v0, kBy1024, load128<kCopy>(dst, src, i));
      v1 = fold128(v1, kBy1024, load128<kCopy>(dst, src, i + 16));
      v2 = fold128(v2, kBy1024, load128<kCopy>(dst, src, i + 32));
      v3 = fold128(v3, kBy1024, load128<kCopy>(dst, src, i + 48));
      v4 = fold128(v4, kBy1024, load128<kCopy>(dst, src, i + 64));
      v5 = fold128(v5, kBy1024, load128<kCopy>(dst, src, i + 80));
      v6 = fold128(v6, kBy1024, load128<kCopy>(dst, src, i + 96));
      v7 = fold128(v7, kBy1024, load128<kCopy>(dst, src, i + 112));
    }
    v0 = fold128(v0, kBy512, v4);
    v1 = fold128(v1, kBy512, v5);
    v2 = fold128(v2, kBy512, v6);
    v3 = fold128(v3, kBy512, v7);
    v0 = fold128(v0, kBy256, v2);
    v1 = fold128(v1, kBy256, v3);
    v0 = fold128(v0, kBy128, v1);
  }
  return finish128<kCopy>(v0, dst, src, i, nbytes);
}

constexpr size_t kFoldingMinNbytes = 16;

}  // namespace

uint32_t extend_pmull(uint32_t crc, const void* data, size_t nbytes) noexcept {
  if (nbytes < kFoldingMinNbytes) return extend_portable(crc, data, nbytes);
  return run<false>(crc, nullptr, static_cast<const uint8_t*>(data), nbytes);
}

uint32_t copy_pmull(uint32_t crc, void* dst, const void* src, size_t nbytes) noexcept {
  if (nbytes < kFoldingMinNbytes) return copy_portable(crc, dst, src, nbytes);
  return run<true>(crc, static_cast<uint8_t*>(dst), static_cast<const uint8_t*>(src), nbytes);
}

}  // namespace internal
}  // namespace sdio

#endif  // SDIO_CRC32_ARM
