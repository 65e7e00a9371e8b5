// The choice of an implementation, in this one place.
#include <array>
#include <cstdlib>
#include <cstring>

#include "checksum/crc32.h"
#include "checksum/crc32_variants.h"

#if defined(SDIO_CRC32_ARM)
#if defined(__APPLE__)
#include <sys/sysctl.h>
#include <sys/types.h>
#else
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif
#endif

namespace sdio {
namespace {

#if defined(SDIO_CRC32_X86)

auto make_implementations() noexcept {
  // These also ask whether the operating system saves the wider registers.
  __builtin_cpu_init();
  const bool has_pclmulqdq = __builtin_cpu_supports("pclmul") != 0 && __builtin_cpu_supports("sse4.1") != 0;
  const bool has_avx2 =
      has_pclmulqdq && __builtin_cpu_supports("avx2") != 0 && __builtin_cpu_supports("vpclmulqdq") != 0;
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") != 0 && __builtin_cpu_supports("avx512vl") != 0;
  return std::array<Crc32Implementation, 4>{{
      {"vpclmulqdq-avx512", has_avx512, internal::extend_vpclmulqdq_avx512, internal::copy_vpclmulqdq_avx512},
      {"vpclmulqdq-avx2", has_avx2, internal::extend_vpclmulqdq_avx2, internal::copy_vpclmulqdq_avx2},
      {"pclmulqdq", has_pclmulqdq, internal::extend_pclmulqdq, internal::copy_pclmulqdq},
      {"portable", true, internal::extend_portable, internal::copy_portable},
  }};
}

#elif defined(SDIO_CRC32_ARM)

#if defined(__APPLE__)

bool has_feature(const char* name) noexcept {
  int value = 0;
  size_t nbytes = sizeof value;
  return sysctlbyname(name, &value, &nbytes, nullptr, 0) == 0 && value != 0;
}

bool has_pmull() noexcept { return has_feature("hw.optional.arm.FEAT_PMULL"); }
bool has_crc32() noexcept { return has_feature("hw.optional.armv8_crc32"); }

#else

bool has_pmull() noexcept { return (getauxval(AT_HWCAP) & HWCAP_PMULL) != 0; }
bool has_crc32() noexcept { return (getauxval(AT_HWCAP) & HWCAP_CRC32) != 0; }

#endif

auto make_implementations() noexcept {
  return std::array<Crc32Implementation, 3>{{
      {"pmull", has_pmull(), internal::extend_pmull, internal::copy_pmull},
      {"armv8-crc32", has_crc32(), internal::extend_armv8_crc32, internal::copy_armv8_crc32},
      {"portable", true, internal::extend_portable, internal::copy_portable},
  }};
}

#else

auto make_implementations() noexcept {
  return std::array<Crc32Implementation, 1>{{
      {"portable", true, internal::extend_portable, internal::copy_portable},
  }};
}

#endif

Crc32Implementation choose() noexcept {
  const auto implementations = make_implementations();
  if (const char* const wanted = std::getenv("STATEDICT_IO_SIMD")) {
    for (const auto& each : implementations) {
      if (each.supported && std::strcmp(each.name, wanted) == 0) return each;
    }
  }
  for (const auto& each : implementations) {
    if (each.supported) return each;
  }
  return implementations.back();
}

const Crc32Implementation& active() noexcept {
  static const Crc32Implementation chosen = choose();
  return chosen;
}

}  // namespace

uint32_t crc32(uint32_t crc, const void* data, size_t nbytes) noexcept { return active().extend(crc, data, nbytes); }

uint32_t crc32_copy(uint32_t crc, void* dst, const void* src, size_t nbytes) noexcept {
  return active().copy(crc, dst, src, nbytes);
}

const char* crc32_active_name() noexcept { return active().name; }

const std::vector<Crc32Implementation>& crc32_implementations() {
  static const auto implementations = make_implementations();
  static const std::vector<Crc32Implementation> listed(implementations.begin(), implementations.end());
  return listed;
}

}  // namespace sdio
