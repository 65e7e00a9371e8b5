// Reads and writes past the page cache: who wants them, and what a file asks of them.
#pragma once

#include <cstddef>

namespace sdio {

enum class DirectIo { kOff, kAuto, kOn };

// What offsets, lengths and memory addresses of direct I/O on the file must be multiples of: a power of two, from a
// page to 1 MiB. 0 where the file refuses direct I/O, or asks for more than whole regions can meet.
size_t direct_io_alignment(int fd);

}  // namespace sdio
