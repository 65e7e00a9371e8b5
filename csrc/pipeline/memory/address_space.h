// How much address space the process may still take where it is limited (RLIMIT_AS, `ulimit -v`).
//
// A plan should take a quarter of it at most: the rest of the program allocates too, and an allocation that fails there
// may be fatal.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sdio {

// Bytes; UINT64_MAX where there is no limit or it cannot be found out.
uint64_t address_space_left();

// How many of `wanted` things, which take `nbytes` each, fit into that quarter; at least `least`.
size_t affordable(size_t wanted, uint64_t nbytes, size_t least);

}  // namespace sdio
