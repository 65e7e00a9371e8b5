// Pickle streams without what costs an unpickler time for nothing.
//
// Pure: bytes in, bytes out; any thread. Depends on nothing.
#pragma once

#include <cstddef>
#include <string>

namespace sdio {

// The stream at `bytes` without the memo puts that no get refers to: the same program, of which every step is the same.
// A pickler memoizes nearly all that it writes; hardly anything is asked for again. A stream with any opcode that
// torch's restricted unpickler does not know comes back as it is, and so does one that is cut off or puts what it does
// not have.
std::string without_unused_puts(const char* bytes, size_t nbytes);

}  // namespace sdio
