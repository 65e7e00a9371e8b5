#include "pipeline/memory/address_space.h"

#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <limits>
#include <memory>

namespace sdio {
namespace {

constexpr uint64_t kUnlimited = std::numeric_limits<uint64_t>::max();
constexpr uint64_t kShare = 4;

// The first number in /proc/self/statm counts pages (man 5 proc); 0 where there is none.
uint64_t address_space_taken() {
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> statm(std::fopen("/proc/self/statm", "re"), &std::fclose);
  unsigned long long num_pages = 0;
  if (statm == nullptr || std::fscanf(statm.get(), "%llu", &num_pages) != 1) return 0;
  return num_pages * static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
}

}  // namespace

uint64_t address_space_left() {
  rlimit limit;
  if (getrlimit(RLIMIT_AS, &limit) != 0 || limit.rlim_cur == RLIM_INFINITY) return kUnlimited;
  const uint64_t taken = address_space_taken();
  if (taken == 0) return kUnlimited;
  return limit.rlim_cur - std::min<uint64_t>(limit.rlim_cur, taken);
}

size_t affordable(size_t wanted, uint64_t nbytes, size_t least) {
  const uint64_t fit = address_space_left() / kShare / nbytes;
  return static_cast<size_t>(std::clamp<uint64_t>(fit, std::min(least, wanted), wanted));
}

}  // namespace sdio
