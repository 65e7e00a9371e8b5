// PCLMULQDQ with SSE4.1: every x86-64 CPU since 2010. Eight accumulators hide the multiply's
// latency.
#include "checksum/crc32_variants.h"

#if defined(SDIO_CRC32_X86)

#include "checksum/crc32_x86.h"

namespace sdio {
namespace internal {
namespace {

template <Store kStore>
SDIO_TARGET_PCLMULQDQ uint32_t run(uint32_t crc, uint8_t* dst, const uint8_t* src, size_t nbytes) noexcept {
  __m128i v0 = _mm_xor_si128(load128<kStore>(dst, src, 0), _mm_cvtsi32_si128(static_cast<int32_t>(~crc)));
  size_t i = 16;
  if (nbytes >= 128) {
    constexpr FoldingPair kBy1024 = folding_pair(1024), kBy512 = folding_pair(512), kBy256 = folding_pair(256),
                          kBy128 = folding_pair(128);
    __m128i v1 = load128<kStore>(dst, src, 16);
    __m128i v2 = load128<kStore>(dst, src, 32);
    __m128i v3 = load128<kStore>(dst, src, 48);
    __m128i v4 = load128<kStore>(dst, src, 64);
    __m128i v5 = load128<kStore>(dst, src, 80);
    __m128i v6 = load128<kStore>(dst, src, 96);
    __m128i v7 = load128<kStore>(dst, src, 112);
    const __m128i by_1024 = to_register(kBy1024);
    for (i = 128; nbytes - i >= 128; i += 128) {
      if constexpr (kStore == Store::kStreaming) {
        prefetch_ahead(src, i);
        prefetch_ahead(src, i + 64);
      }
      v0 = fold128(v0, by_1024, load128<kStore>(dst, src, i));
      v1 = fold128(v1, by_1024, load128<kStore>(dst, src, i + 16));
      v2 = fold128(v2, by_1024, load128<kStore>(dst, src, i + 32));
      v3 = fold128(v3, by_1024, load128<kStore>(dst, src, i + 48));
      v4 = fold128(v4, by_1024, load128<kStore>(dst, src, i + 64));
      v5 = fold128(v5, by_1024, load128<kStore>(dst, src, i + 80));
      v6 = fold128(v6, by_1024, load128<kStore>(dst, src, i + 96));
      v7 = fold128(v7, by_1024, load128<kStore>(dst, src, i + 112));
    }
    const __m128i by_512 = to_register(kBy512);
    v0 = fold128(v0, by_512, v4);
    v1 = fold128(v1, by_512, v5);
    v2 = fold128(v2, by_512, v6);
    v3 = fold128(v3, by_512, v7);
    const __m128i by_256 = to_register(kBy256);
    v0 = fold128(v0, by_256, v2);
    v1 = fold128(v1, by_256, v3);
    v0 = fold128(v0, to_register(kBy128), v1);
  }
  return finish128<kStore>(v0, dst, src, i, nbytes);
}

}  // namespace

uint32_t extend_pclmulqdq(uint32_t crc, const void* data, size_t nbytes) noexcept {
  return extend_by<run<Store::kNone>>(crc, data, nbytes);
}

uint32_t copy_pclmulqdq(uint32_t crc, void* dst, const void* src, size_t nbytes) noexcept {
  return copy_by<run<Store::kCached>, run<Store::kStreaming>>(crc, dst, src, nbytes);
}

}  // namespace internal
}  // namespace sdio

#endif  // SDIO_CRC32_X86
