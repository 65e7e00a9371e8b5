// Slicing-by-8: for CPUs without carry-less multiply, and for the others' shortest inputs.
//
// Table k takes a byte to its CRC after k zero bytes, so eight independent look-ups advance the CRC
// by eight bytes.
#include "checksum/crc32_copy_in_blocks.h"
#include "checksum/crc32_polynomial.h"
#include "checksum/crc32_variants.h"

namespace sdio {
namespace internal {
namespace {

struct SlicingTables {
  uint32_t table[8][256];
};

constexpr SlicingTables make_slicing_tables() noexcept {
  SlicingTables tables{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t crc = byte;
    for (int bit = 0; bit < 8; ++bit) crc = times_x(crc);
    tables.table[0][byte] = crc;
  }
  for (int k = 1; k < 8; ++k) {
    for (uint32_t byte = 0; byte < 256; ++byte) {
      const uint32_t shorter = tables.table[k - 1][byte];
      tables.table[k][byte] = (shorter >> 8) ^ tables.table[0][shorter & 0xFFU];
    }
  }
  return tables;
}

constexpr SlicingTables kSlicing = make_slicing_tables();

// Compilers make one load of it, and on big-endian machines a byte swap.
inline uint32_t load_little_endian32(const uint8_t* p) noexcept {
  return uint32_t{p[0]} | uint32_t{p[1]} << 8 | uint32_t{p[2]} << 16 | uint32_t{p[3]} << 24;
}

}  // namespace

uint32_t extend_portable(uint32_t crc, const void* data, size_t nbytes) noexcept {
  const auto* const bytes = static_cast<const uint8_t*>(data);
  const auto& t = kSlicing.table;
  uint32_t state = ~crc;
  size_t i = 0;
  for (; nbytes - i >= 8; i += 8) {
    const uint32_t first = state ^ load_little_endian32(bytes + i);
    const uint32_t second = load_little_endian32(bytes + i + 4);
    state = t[7][first & 0xFFU] ^ t[6][first >> 8 & 0xFFU] ^ t[5][first >> 16 & 0xFFU] ^ t[4][first >> 24] ^
            t[3][second & 0xFFU] ^ t[2][second >> 8 & 0xFFU] ^ t[1][second >> 16 & 0xFFU] ^ t[0][second >> 24];
  }
  for (; i < nbytes; ++i) state = t[0][(state ^ bytes[i]) & 0xFFU] ^ (state >> 8);
  return ~state;
}

uint32_t copy_portable(uint32_t crc, void* dst, const void* src, size_t nbytes) noexcept {
  return copy_in_blocks<extend_portable>(crc, dst, src, nbytes);
}

}  // namespace internal
}  // namespace sdio
