// Arithmetic on finished CRCs: a CRC shifted over n zero bytes is the CRC times x^(8n) mod P.
//
// The inversions of the first and last 32 bits cancel: they are the same for crc(a || 0...0) and
// for crc(0...0), and only the difference of the two is wanted.
#include "checksum/crc32.h"
#include "checksum/crc32_polynomial.h"

namespace sdio {
namespace {

// shift[k][digit] is x^(8 * digit * 16^k) mod P: one multiply for each hexadecimal digit of a
// distance.
constexpr unsigned kDigits = 8;

struct ByteShiftTable {
  uint32_t shift[kDigits][16];
};

constexpr ByteShiftTable make_byte_shift_table() noexcept {
  ByteShiftTable table{};
  uint32_t unit = internal::power_of_x(8);
  for (auto& row : table.shift) {
    row[0] = internal::power_of_x(0);
    for (int digit = 1; digit < 16; ++digit) {
      row[digit] = internal::multiply_mod_p(row[digit - 1], unit);
    }
    unit = internal::multiply_mod_p(row[15], unit);
  }
  return table;
}

constexpr ByteShiftTable kByteShift = make_byte_shift_table();

}  // namespace

uint32_t crc32_shift(uint32_t crc_piece, uint64_t nbytes_after) noexcept {
  // x^(2^32 - 1) == 1 (mod P): the distance counts only modulo 2^32 - 1. The sum of its halves may
  // have 33 bits, the sum of the halves of that has 32.
  uint64_t distance = (nbytes_after >> 32) + (nbytes_after & 0xFFFFFFFFU);
  distance = (distance >> 32) + (distance & 0xFFFFFFFFU);
  for (unsigned k = 0; distance != 0; ++k, distance >>= 4) {
    const auto digit = distance & 0xFU;
    if (digit != 0) crc_piece = internal::multiply_mod_p(crc_piece, kByteShift.shift[k][digit]);
  }
  return crc_piece;
}

}  // namespace sdio
