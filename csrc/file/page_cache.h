// Whether the page cache holds parts of a file.
#pragma once

#include <cstdint>

namespace sdio {

// Whether a buffered read of the range would come from memory: nearly all of it is cached. Asks the kernel alone
// (cachestat, Linux 6.5); where it does not answer, looks at two pages, which may start a read-ahead. False where
// nobody can tell. Any thread.
bool is_cached(int fd, uint64_t offset, uint64_t nbytes);

}  // namespace sdio
