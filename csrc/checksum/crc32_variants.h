// What the dispatcher chooses from: the entry points of every implementation. Internal to
// checksum/.
//
// Each pair has the contract of sdio::crc32 and sdio::crc32_copy, and must be called only on a CPU
// with the instructions named.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__x86_64__)
#define SDIO_CRC32_X86 1
#elif defined(__aarch64__) && defined(__AARCH64EL__) && (defined(__linux__) || defined(__APPLE__))
#define SDIO_CRC32_ARM 1  // on systems that the dispatcher knows how to ask about the CPU
#endif

namespace sdio {
namespace internal {

uint32_t extend_portable(uint32_t crc, const void* data, size_t nbytes) noexcept;
uint32_t copy_portable(uint32_t crc, void* dst, const void* src, size_t nbytes) noexcept;

#if defined(SDIO_CRC32_X86)
uint32_t extend_pclmulqdq(uint32_t crc, const void* data, size_t nbytes) noexcept;
uint32_t copy_pclmulqdq(uint32_t crc, void* dst, const void* src, size_t nbytes) noexcept;
uint32_t extend_vpclmulqdq_avx2(uint32_t crc, const void* data, size_t nbytes) noexcept;
uint32_t copy_vpclmulqdq_avx2(uint32_t crc, void* dst, const void* src, size_t nbytes) noexcept;
uint32_t extend_vpclmulqdq_avx512(uint32_t crc, const void* data, size_t nbytes) noexcept;
uint32_t copy_vpclmulqdq_avx512(uint32_t crc, void* dst, const void* src, size_t nbytes) noexcept;
#endif

#if defined(SDIO_CRC32_ARM)
uint32_t extend_armv8_crc32(uint32_t crc, const void* data, size_t nbytes) noexcept;
uint32_t copy_armv8_crc32(uint32_t crc, void* dst, const void* src, size_t nbytes) noexcept;
uint32_t extend_pmull(uint32_t crc, const void* data, size_t nbytes) noexcept;
uint32_t copy_pmull(uint32_t crc, void* dst, const void* src, size_t nbytes) noexcept;
#endif

}  // namespace internal
}  // namespace sdio
