#include "file/page_cache.h"

#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>
#ifdef __linux__
#include <sys/syscall.h>
#endif

#include <atomic>
#include <cerrno>

namespace sdio {
namespace {

#ifdef __linux__
// As in linux/mman.h of 6.5, which the headers of the build may not have yet. One number on all architectures.
struct CachestatRange {
  uint64_t offset;
  uint64_t nbytes;
};
struct Cachestat {
  uint64_t nr_cache;
  uint64_t nr_dirty;
  uint64_t nr_writeback;
  uint64_t nr_evicted;
  uint64_t nr_recently_evicted;
};
constexpr long kSysCachestat = 451;

// RWF_NOWAIT fails with EAGAIN where it would have to wait for the device.
bool first_byte_is_cached(int fd, uint64_t offset) {
#ifdef RWF_NOWAIT
  char byte;
  const iovec piece = {&byte, 1};
  return preadv2(fd, &piece, 1, static_cast<off_t>(offset), RWF_NOWAIT) == 1;
#else
  static_cast<void>(fd), static_cast<void>(offset);
  return false;
#endif
}
#endif

}  // namespace

bool is_cached(int fd, uint64_t offset, uint64_t nbytes) {
#ifdef __linux__
  if (nbytes == 0) return true;
  static std::atomic<bool> has_cachestat{true};  // a kernel before 6.5 has not
  if (has_cachestat) {
    const CachestatRange range = {offset, nbytes};
    Cachestat found;
    if (syscall(kSysCachestat, fd, &range, &found, 0) == 0) {
      static const auto page_nbytes = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
      const uint64_t num_pages = (offset + nbytes - 1) / page_nbytes - offset / page_nbytes + 1;
      return found.nr_cache >= num_pages - num_pages / 16;
    }
    if (errno == ENOSYS) has_cachestat = false;
  }
  return first_byte_is_cached(fd, offset) && first_byte_is_cached(fd, offset + nbytes - 1);
#else
  static_cast<void>(fd), static_cast<void>(offset), static_cast<void>(nbytes);
  return false;
#endif
}

}  // namespace sdio
