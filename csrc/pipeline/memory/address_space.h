// How much address space the process may still take where it is limited (RLIMIT_AS, `ulimit -v`).
//
// What is planned against it takes a quarter at most: the rest of the program allocates too, and there an allocation
// that fails may be fatal.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sdio {

// Bytes; UINT64_MAX where there is no limit or it cannot be found out.
uint64_t address_space_left();

// As many as fit of `wanted` things that take `nbytes` each, `least` at least.
size_t affordable(size_t wanted, uint64_t nbytes, size_t least);

}  // namespace sdio
