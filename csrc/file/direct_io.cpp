#include "file/direct_io.h"

#include <fcntl.h>
#include <sys/stat.h>

#include <algorithm>

namespace sdio {

size_t direct_io_alignment(int fd) {
  size_t asked = 4096;
#ifdef STATX_DIOALIGN
  struct statx facts;
  if (statx(fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &facts) == 0 && (facts.stx_mask & STATX_DIOALIGN) != 0) {
    asked = std::max(facts.stx_dio_mem_align, facts.stx_dio_offset_align);
  }
#else
  static_cast<void>(fd);
#endif
  const bool usable = asked != 0 && asked <= (1u << 20) && (asked & (asked - 1)) == 0;
  return usable ? std::max<size_t>(asked, 4096) : 0;
}

}  // namespace sdio
