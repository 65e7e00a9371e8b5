// VPCLMULQDQ on 512-bit registers: four lanes an instruction, and vpternlogq for the three-way XOR.
// Four accumulators: eight measured the same on Zen 4.
#include "checksum/crc32_variants.h"

#if defined(SDIO_CRC32_X86)

#if defined(__GNUC__) && !defined(__clang__)
// False for _mm512_castsi512_si256 and others in GCC's own headers (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#include "checksum/crc32_x86.h"

#define SDIO_TARGET_AVX512 __attribute__((target("pclmul,sse4.1,avx512f,avx512vl,vpclmulqdq")))

namespace sdio {
namespace internal {
namespace {

template <Store kStore>
SDIO_TARGET_AVX512 SDIO_ALWAYS_INLINE __m512i load512(uint8_t* dst, const uint8_t* src, size_t offset) noexcept {
  const __m512i bytes = _mm512_loadu_si512(src + offset);
  if constexpr (kStore == Store::kCached) {
    _mm512_storeu_si512(dst + offset, bytes);
  } else if constexpr (kStore == Store::kStreaming) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(dst + offset), bytes);
    prefetch_ahead(src, offset);
  } else {
    static_cast<void>(dst);
  }
  return bytes;
}

SDIO_TARGET_AVX512 SDIO_ALWAYS_INLINE __m512i fold512(__m512i v, __m512i constants, __m512i next) noexcept {
  constexpr int kXorOfThree = 0x96;
  const __m512i lo = _mm512_clmulepi64_epi128(v, constants, 0x00);
  const __m512i hi = _mm512_clmulepi64_epi128(v, constants, 0x11);
  return _mm512_ternarylogic_epi64(lo, hi, next, kXorOfThree);
}

SDIO_TARGET_AVX512 SDIO_ALWAYS_INLINE __m512i to_lanes(FoldingPair lane0, FoldingPair lane1, FoldingPair lane2,
                                                       FoldingPair lane3) noexcept {
  return _mm512_set_epi64(static_cast<int64_t>(lane3.hi), static_cast<int64_t>(lane3.lo),
                          static_cast<int64_t>(lane2.hi), static_cast<int64_t>(lane2.lo),
                          static_cast<int64_t>(lane1.hi), static_cast<int64_t>(lane1.lo),
                          static_cast<int64_t>(lane0.hi), static_cast<int64_t>(lane0.lo));
}

SDIO_TARGET_AVX512 SDIO_ALWAYS_INLINE __m512i to_lanes(FoldingPair pair) noexcept {
  return to_lanes(pair, pair, pair, pair);
}

template <Store kStore>
SDIO_TARGET_AVX512 uint32_t run(uint32_t crc, uint8_t* dst, const uint8_t* src, size_t nbytes) noexcept {
  const __m128i initial = _mm_cvtsi32_si128(static_cast<int32_t>(~crc));
  if (nbytes < 64) {
    const __m128i v = _mm_xor_si128(load128<kStore>(dst, src, 0), initial);
    return finish128<kStore>(v, dst, src, 16, nbytes);
  }
  constexpr FoldingPair kBy2048 = folding_pair(2048), kBy1024 = folding_pair(1024), kBy512 = folding_pair(512),
                        kBy384 = folding_pair(384), kBy256 = folding_pair(256), kBy128 = folding_pair(128);
  __m512i v0 = _mm512_xor_si512(load512<kStore>(dst, src, 0), _mm512_inserti32x4(_mm512_setzero_si512(), initial, 0));
  const __m512i by_512 = to_lanes(kBy512);
  size_t i = 64;
  if (nbytes >= 256) {
    __m512i v1 = load512<kStore>(dst, src, 64);
    __m512i v2 = load512<kStore>(dst, src, 128);
    __m512i v3 = load512<kStore>(dst, src, 192);
    const __m512i by_2048 = to_lanes(kBy2048);
    for (i = 256; nbytes - i >= 256; i += 256) {
      v0 = fold512(v0, by_2048, load512<kStore>(dst, src, i));
      v1 = fold512(v1, by_2048, load512<kStore>(dst, src, i + 64));
      v2 = fold512(v2, by_2048, load512<kStore>(dst, src, i + 128));
      v3 = fold512(v3, by_2048, load512<kStore>(dst, src, i + 192));
    }
    const __m512i by_1024 = to_lanes(kBy1024);
    v0 = fold512(v0, by_1024, v2);
    v1 = fold512(v1, by_1024, v3);
    v0 = fold512(v0, by_512, v1);
  }
  for (; nbytes - i >= 64; i += 64) v0 = fold512(v0, by_512, load512<kStore>(dst, src, i));

  // Each lane is folded by its own distance to the last, which stays.
  const __m512i last_lane = _mm512_maskz_mov_epi64(0xC0, v0);
  v0 = fold512(v0, to_lanes(kBy384, kBy256, kBy128, FoldingPair{0, 0}), last_lane);
  const __m256i two = _mm256_xor_si256(_mm512_castsi512_si256(v0), _mm512_extracti64x4_epi64(v0, 1));
  const __m128i v = _mm_xor_si128(_mm256_castsi256_si128(two), _mm256_extracti128_si256(two, 1));
  return finish128<kStore>(v, dst, src, i, nbytes);
}

}  // namespace

uint32_t extend_vpclmulqdq_avx512(uint32_t crc, const void* data, size_t nbytes) noexcept {
  return extend_by<run<Store::kNone>>(crc, data, nbytes);
}

uint32_t copy_vpclmulqdq_avx512(uint32_t crc, void* dst, const void* src, size_t nbytes) noexcept {
  return copy_by<run<Store::kCached>, run<Store::kStreaming>>(crc, dst, src, nbytes);
}

}  // namespace internal
}  // namespace sdio

#endif  // SDIO_CRC32_X86
