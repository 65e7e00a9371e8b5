// Blocks, padding, and the choice of an implementation.
#include "checksum/sha256.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "checksum/sha256_variants.h"

#if defined(SDIO_SHA256_X86)
#include <cpuid.h>
#elif defined(SDIO_SHA256_ARM) && defined(__APPLE__)
#include <sys/sysctl.h>
#include <sys/types.h>
#elif defined(SDIO_SHA256_ARM)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace sdio {
namespace {

#if defined(SDIO_SHA256_X86)

bool has_sha_ni() noexcept {  // compilers know the name only since GCC 14
  __builtin_cpu_init();
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) return false;
  return (ebx >> 29 & 1) != 0 && __builtin_cpu_supports("sse4.1") != 0;
}

auto make_implementations() noexcept {
  return std::array<Sha256Implementation, 2>{{
      {"sha-ni", has_sha_ni(), internal::sha256_sha_ni},
      {"portable", true, internal::sha256_portable},
  }};
}

#elif defined(SDIO_SHA256_ARM)

#if defined(__APPLE__)
bool has_sha2() noexcept {
  int value = 0;
  size_t nbytes = sizeof value;
  return sysctlbyname("hw.optional.arm.FEAT_SHA256", &value, &nbytes, nullptr, 0) == 0 && value != 0;
}
#else
bool has_sha2() noexcept { return (getauxval(AT_HWCAP) & HWCAP_SHA2) != 0; }
#endif

auto make_implementations() noexcept {
  return std::array<Sha256Implementation, 2>{{
      {"armv8-sha2", has_sha2(), internal::sha256_armv8_sha2},
      {"portable", true, internal::sha256_portable},
  }};
}

#else

auto make_implementations() noexcept {
  return std::array<Sha256Implementation, 1>{{{"portable", true, internal::sha256_portable}}};
}

#endif

Sha256Implementation choose() noexcept {
  const auto implementations = make_implementations();
  const char* const wanted = std::getenv("STATEDICT_IO_SIMD");
  for (const auto& each : implementations) {
    if (each.supported && wanted != nullptr && std::strcmp(each.name, wanted) == 0) return each;
  }
  for (const auto& each : implementations) {
    if (each.supported) return each;
  }
  return implementations.back();
}

const Sha256Implementation& active() noexcept {
  static const Sha256Implementation chosen = choose();
  return chosen;
}

}  // namespace

Sha256::Sha256() noexcept : Sha256(active().compress) {}

void Sha256::update(const void* data, size_t nbytes) noexcept {
  const auto* bytes = static_cast<const uint8_t*>(data);
  const size_t there = nbytes_ % kBlockNbytes;
  nbytes_ += nbytes;
  if (there != 0) {
    const size_t taken = std::min(nbytes, kBlockNbytes - there);
    if (taken != 0) std::memcpy(block_ + there, bytes, taken);
    if (there + taken < kBlockNbytes) return;
    compress_(state_, block_, 1);
    bytes += taken;
    nbytes -= taken;
  }
  compress_(state_, bytes, nbytes / kBlockNbytes);
  const size_t rest = nbytes % kBlockNbytes;
  if (rest != 0) std::memcpy(block_, bytes + (nbytes - rest), rest);
}

void Sha256::update_zeros(uint64_t nbytes) noexcept {
  static constexpr uint8_t kZeros[4096] = {};
  for (uint64_t done = 0; done < nbytes; done += sizeof kZeros) {
    update(kZeros, static_cast<size_t>(std::min<uint64_t>(sizeof kZeros, nbytes - done)));
  }
}

Sha256::Sum Sha256::finish() noexcept {
  const uint64_t nbits = nbytes_ * 8;
  const uint8_t end[kBlockNbytes + 8] = {0x80};
  const size_t there = nbytes_ % kBlockNbytes;
  update(end, (there < kBlockNbytes - 8 ? kBlockNbytes - 8 : 2 * kBlockNbytes - 8) - there);
  uint8_t length[8];
  for (int i = 0; i < 8; ++i) length[i] = static_cast<uint8_t>(nbits >> (56 - 8 * i));
  update(length, sizeof length);
  Sum sum;
  for (size_t i = 0; i < sum.size(); ++i) sum[i] = static_cast<uint8_t>(state_[i / 4] >> (24 - 8 * (i % 4)));
  return sum;
}

const std::vector<Sha256Implementation>& sha256_implementations() {
  static const auto implementations = make_implementations();
  static const std::vector<Sha256Implementation> listed(implementations.begin(), implementations.end());
  return listed;
}

const char* sha256_active_name() noexcept { return active().name; }

}  // namespace sdio
