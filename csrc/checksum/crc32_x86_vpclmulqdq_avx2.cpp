// VPCLMULQDQ on 256-bit registers: for CPUs that have it without AVX-512 (Zen 3, Alder Lake and
// later client CPUs).
#include "checksum/crc32_variants.h"

#if defined(SDIO_CRC32_X86)

#include "checksum/crc32_x86.h"

#define SDIO_TARGET_AVX2 __attribute__((target("pclmul,sse4.1,avx2,vpclmulqdq")))

namespace sdio {
namespace internal {
namespace {

template <Store kStore>
SDIO_TARGET_AVX2 SDIO_ALWAYS_INLINE __m256i load256(uint8_t* dst, const uint8_t* src, size_t offset) noexcept {
  const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src + offset));
  if constexpr (kStore == Store::kCached) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst + offset), bytes);
  } else if constexpr (kStore == Store::kStreaming) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(dst + offset), bytes);
  } else {
    static_cast<void>(dst);
  }
  return bytes;
}

SDIO_TARGET_AVX2 SDIO_ALWAYS_INLINE __m256i fold256(__m256i v, __m256i constants, __m256i next) noexcept {
  const __m256i lo = _mm256_clmulepi64_epi128(v, constants, 0x00);
  const __m256i hi = _mm256_clmulepi64_epi128(v, constants, 0x11);
  return _mm256_xor_si256(_mm256_xor_si256(lo, hi), next);
}

SDIO_TARGET_AVX2 SDIO_ALWAYS_INLINE __m256i to_lanes(FoldingPair pair) noexcept {
  return _mm256_broadcastsi128_si256(to_register(pair));
}

template <Store kStore>
SDIO_TARGET_AVX2 uint32_t run(uint32_t crc, uint8_t* dst, const uint8_t* src, size_t nbytes) noexcept {
  const __m128i initial = _mm_cvtsi32_si128(static_cast<int32_t>(~crc));
  if (nbytes < 32) {
    const __m128i v = _mm_xor_si128(load128<kStore>(dst, src, 0), initial);
    return finish128<kStore>(v, dst, src, 16, nbytes);
  }
  constexpr FoldingPair kBy2048 = folding_pair(2048), kBy1024 = folding_pair(1024), kBy512 = folding_pair(512),
                        kBy256 = folding_pair(256), kBy128 = folding_pair(128);
  __m256i v0 =
      _mm256_xor_si256(load256<kStore>(dst, src, 0), _mm256_inserti128_si256(_mm256_setzero_si256(), initial, 0));
  const __m256i by_256 = to_lanes(kBy256);
  size_t i = 32;
  if (nbytes >= 256) {
    __m256i v1 = load256<kStore>(dst, src, 32);
    __m256i v2 = load256<kStore>(dst, src, 64);
    __m256i v3 = load256<kStore>(dst, src, 96);
    __m256i v4 = load256<kStore>(dst, src, 128);
    __m256i v5 = load256<kStore>(dst, src, 160);
    __m256i v6 = load256<kStore>(dst, src, 192);
    __m256i v7 = load256<kStore>(dst, src, 224);
    const __m256i by_2048 = to_lanes(kBy2048);
    for (i = 256; nbytes - i >= 256; i += 256) {
      if constexpr (kStore == Store::kStreaming) {
        prefetch_ahead(src, i);
        prefetch_ahead(src, i + 64);
        prefetch_ahead(src, i + 128);
        prefetch_ahead(src, i + 192);
      }
      v0 = fold256(v0, by_2048, load256<kStore>(dst, src, i));
      v1 = fold256(v1, by_2048, load256<kStore>(dst, src, i + 32));
      v2 = fold256(v2, by_2048, load256<kStore>(dst, src, i + 64));
      v3 = fold256(v3, by_2048, load256<kStore>(dst, src, i + 96));
      v4 = fold256(v4, by_2048, load256<kStore>(dst, src, i + 128));
      v5 = fold256(v5, by_2048, load256<kStore>(dst, src, i + 160));
      v6 = fold256(v6, by_2048, load256<kStore>(dst, src, i + 192));
      v7 = fold256(v7, by_2048, load256<kStore>(dst, src, i + 224));
    }
    const __m256i by_1024 = to_lanes(kBy1024);
    v0 = fold256(v0, by_1024, v4);
    v1 = fold256(v1, by_1024, v5);
    v2 = fold256(v2, by_1024, v6);
    v3 = fold256(v3, by_1024, v7);
    const __m256i by_512 = to_lanes(kBy512);
    v0 = fold256(v0, by_512, v2);
    v1 = fold256(v1, by_512, v3);
    v0 = fold256(v0, by_256, v1);
  }
  for (; nbytes - i >= 32; i += 32) v0 = fold256(v0, by_256, load256<kStore>(dst, src, i));

  const __m128i v = fold128(_mm256_castsi256_si128(v0), to_register(kBy128), _mm256_extracti128_si256(v0, 1));
  return finish128<kStore>(v, dst, src, i, nbytes);
}

}  // namespace

uint32_t extend_vpclmulqdq_avx2(uint32_t crc, const void* data, size_t nbytes) noexcept {
  return extend_by<run<Store::kNone>>(crc, data, nbytes);
}

uint32_t copy_vpclmulqdq_avx2(uint32_t crc, void* dst, const void* src, size_t nbytes) noexcept {
  return copy_by<run<Store::kCached>, run<Store::kStreaming>>(crc, dst, src, nbytes);
}

}  // namespace internal
}  // namespace sdio

#endif  // SDIO_CRC32_X86
