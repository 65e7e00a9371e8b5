// CRC-32 of zip archives (ISO 3309, polynomial 0x04C11DB7 reflected), with zlib's conventions.
//
// Every function is pure, allocates nothing and may be called from any thread at any time. The
// implementation is chosen once, at first use, from what the CPU supports; the environment variable
// STATEDICT_IO_SIMD=<name> asks for another one (an unknown or unsupported name is ignored).
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace sdio {

// Extends `crc` over `nbytes` bytes; start with 0. crc32(crc32(0, a), b) == crc32(0, a || b).
uint32_t crc32(uint32_t crc, const void* data, size_t nbytes) noexcept;

// Copies `src` to `dst` and extends `crc` over the bytes, reading each from memory once. The two
// must not overlap. Large destinations bypass the cache: they are meant for a device, not to be
// read back by this core. When it returns, other threads may be told of the bytes in any usual way.
uint32_t crc32_copy(uint32_t crc, void* dst, const void* src, size_t nbytes) noexcept;

// The contribution of a piece to the CRC of its record: the piece's CRC, shifted over the bytes
// that follow the piece in the record. The XOR of all contributions, in any order, is the record's
// CRC.
uint32_t crc32_shift(uint32_t crc_piece, uint64_t nbytes_after) noexcept;

// One way to compute `crc32` (extend) and `crc32_copy` (copy).
struct Crc32Implementation {
  const char* name;
  bool supported;  // By this CPU; if not, neither function may be called.
  uint32_t (*extend)(uint32_t crc, const void* data, size_t nbytes) noexcept;
  uint32_t (*copy)(uint32_t crc, void* dst, const void* src, size_t nbytes) noexcept;
};

// Every implementation that was compiled in, fastest first, the portable one last. Used by tests
// and benchmarks.
const std::vector<Crc32Implementation>& crc32_implementations();

// The name of the implementation behind `crc32` and `crc32_copy`.
const char* crc32_active_name() noexcept;

}  // namespace sdio
