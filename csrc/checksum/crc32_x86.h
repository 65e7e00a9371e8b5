// What the x86 implementations share: the 128-bit steps that all end with (crc32_polynomial.h has
// the algorithm) and how a copy stores. Internal to checksum/; included only where SDIO_CRC32_X86
// is defined.
//
// What uses vector instructions here is always inlined, so that it is encoded for the caller's instruction set: legacy
// SSE code would stall after AVX code.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "checksum/crc32_polynomial.h"
#include "checksum/crc32_variants.h"

#define SDIO_TARGET_PCLMULQDQ __attribute__((target("pclmul,sse4.1")))
#define SDIO_ALWAYS_INLINE inline __attribute__((always_inline))

namespace sdio {
namespace internal {

// Inputs shorter than a 128-bit register are left to the portable implementation.
constexpr size_t kFoldingMinNbytes = 16;

// What becomes of the bytes that are loaded.
enum class Store { kNone, kCached, kStreaming };

// Copies of at least this size store past the cache, and prefetch this far ahead. Measured on Zen
// 4, 8 MiB chunks from 1 GiB in RAM to huge pages: as fast as cached stores where the destinations
// fit the last-level cache, 1.4 to 1.6 times as fast where they don't. Prefetching gained nothing
// without a copy.
constexpr size_t kStreamingMinNbytes = 256 * 1024;
constexpr size_t kPrefetchNbytes = 2048;

SDIO_ALWAYS_INLINE void prefetch_ahead(const uint8_t* src, size_t offset) noexcept {
  // Past the end of the source is no place for a pointer, but prefetching never faults.
  const uintptr_t address = reinterpret_cast<uintptr_t>(src) + offset + kPrefetchNbytes;
  _mm_prefetch(reinterpret_cast<const char*>(address), _MM_HINT_T0);
}

SDIO_TARGET_PCLMULQDQ SDIO_ALWAYS_INLINE __m128i to_register(FoldingPair pair) noexcept {
  return _mm_set_epi64x(static_cast<int64_t>(pair.hi), static_cast<int64_t>(pair.lo));
}

// Loads the 16 bytes at src + offset and stores them at dst + offset, for kStreaming on a multiple
// of 16.
template <Store kStore>
SDIO_TARGET_PCLMULQDQ SDIO_ALWAYS_INLINE __m128i load128(uint8_t* dst, const uint8_t* src, size_t offset) noexcept {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(src + offset));
  if constexpr (kStore == Store::kCached) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(dst + offset), bytes);
  } else if constexpr (kStore == Store::kStreaming) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(dst + offset), bytes);
  } else {
    static_cast<void>(dst);
  }
  return bytes;
}

// `v` folded over the distance of `constants`, plus `next`.
SDIO_TARGET_PCLMULQDQ SDIO_ALWAYS_INLINE __m128i fold128(__m128i v, __m128i constants, __m128i next) noexcept {
  const __m128i lo = _mm_clmulepi64_si128(v, constants, 0x00);
  const __m128i hi = _mm_clmulepi64_si128(v, constants, 0x11);
  return _mm_xor_si128(_mm_xor_si128(lo, hi), next);
}

// A window of 16 bytes at n is the shuffle that moves the first n bytes of a register to its end,
// one at 16 + n the shuffle that moves what follows them to the front. The top bits clear the rest.
alignas(16) constexpr uint8_t kShift[48] = {
    0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80,
    0x00, 0x01, 0x02, 0x03, 0x04, 0x05, 0x06, 0x07, 0x08, 0x09, 0x0A, 0x0B, 0x0C, 0x0D, 0x0E, 0x0F,
    0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80,
};

// The 128-bit accumulator `v` extended over the bytes [offset, nbytes), and reduced to a CRC. At
// least 16 bytes lie before `offset`. Ordinary stores even for kStreaming: these are parts of
// lines.
template <Store kStore>
SDIO_TARGET_PCLMULQDQ SDIO_ALWAYS_INLINE uint32_t finish128(__m128i v, uint8_t* dst, const uint8_t* src, size_t offset,
                                                            size_t nbytes) noexcept {
  constexpr Store kTail = kStore == Store::kNone ? Store::kNone : Store::kCached;
  constexpr FoldingPair kBy128 = folding_pair(128);
  const __m128i by_128 = to_register(kBy128);
  for (; nbytes - offset >= 16; offset += 16) {
    v = fold128(v, by_128, load128<kTail>(dst, src, offset));
  }
  const size_t rest = nbytes - offset;
  if (rest != 0) {
    // v and the last bytes make two registers, the first with leading zero bytes.
    const __m128i to_end = _mm_loadu_si128(reinterpret_cast<const __m128i*>(kShift + rest));
    const __m128i to_front = _mm_loadu_si128(reinterpret_cast<const __m128i*>(kShift + 16 + rest));
    const __m128i last = load128<kTail>(dst, src, nbytes - 16);
    const __m128i second = _mm_blendv_epi8(_mm_shuffle_epi8(v, to_front), last, to_front);
    v = fold128(_mm_shuffle_epi8(v, to_end), by_128, second);
  }
  const __m128i reduce = _mm_set_epi64x(0, static_cast<int64_t>(kReduceTo96));
  const __m128i barrett =
      _mm_set_epi64x(static_cast<int64_t>(kBarrettPolynomial), static_cast<int64_t>(kBarrettQuotient));
  const __m128i t = _mm_xor_si128(_mm_clmulepi64_si128(v, reduce, 0x00), _mm_srli_si128(v, 8));
  const __m128i q = _mm_clmulepi64_si128(t, barrett, 0x00);
  const __m128i qp = _mm_clmulepi64_si128(q, barrett, 0x10);
  return ~static_cast<uint32_t>(_mm_extract_epi32(_mm_xor_si128(t, qp), 2));
}

// sdio::crc32 and sdio::crc32_copy from the instances of a variant's loop.
using Run = uint32_t (*)(uint32_t crc, uint8_t* dst, const uint8_t* src, size_t nbytes) noexcept;

template <Run run>
inline uint32_t extend_by(uint32_t crc, const void* data, size_t nbytes) noexcept {
  if (nbytes < kFoldingMinNbytes) return extend_portable(crc, data, nbytes);
  return run(crc, nullptr, static_cast<const uint8_t*>(data), nbytes);
}

template <Run run_cached, Run run_streaming>
inline uint32_t copy_by(uint32_t crc, void* dst, const void* src, size_t nbytes) noexcept {
  if (nbytes < kFoldingMinNbytes) return copy_portable(crc, dst, src, nbytes);
  auto* const to = static_cast<uint8_t*>(dst);
  const auto* const from = static_cast<const uint8_t*>(src);
  if (nbytes < kStreamingMinNbytes) return run_cached(crc, to, from, nbytes);
  const size_t head = (0 - reinterpret_cast<uintptr_t>(dst)) & 63U;
  crc = copy_by<run_cached, run_streaming>(crc, to, from, head);
  crc = run_streaming(crc, to + head, from + head, nbytes - head);
  _mm_sfence();  // Streaming stores are not ordered with a later release.
  return crc;
}

}  // namespace internal
}  // namespace sdio
