// Polynomial arithmetic behind every implementation, and how the carry-less multiply ones work.
//
// A message is a polynomial over GF(2): its first bit is the coefficient of the highest power of x.
// Its CRC is message * x^32 mod P, with the first 32 bits of the message and the result inverted.
// P = x^32 + x^26 + ... + 1. Zip's CRC is reflected: bit 0 of a byte comes first. So in an N-bit
// little-endian register bit i holds the coefficient of x^(N-1-i), and the bytes of the message can
// be loaded as they lie.
//
// Folding. A 128-bit accumulator V stands for all the bits read so far: it is congruent to them mod
// P, so nothing but V is kept. Reading D more bits means V * x^D + new bits. Split V into its
// 64-bit halves, V = lo * x^64 + hi (lo comes first and so has the higher powers):
//
//   V * x^D = lo * x^(D+64) + hi * x^D == lo * (x^(D+64) mod P) + hi * (x^D mod P)    (mod P)
//
// Each product is at most 64 + 32 bits long and fits the register again: two carry-less multiplies
// and two XORs for each 128 bits, whatever D. A single accumulator waits for its own multiplies, so
// implementations keep n of them, each over every n-th block (D = n * 128), and fold these into one
// at the end; those with wider registers do the same in each 128-bit lane.
//
// The constants. The product of the reflected a (bit i is x^(63-i)) and b (bit j is x^(31-j),
// stored one bit to the left, so that bit j+1 is x^(31-j)) has x^d at bit 95-d. Read as a 128-bit
// register, in which bit 95-d is x^(d+32), that is a * b * x^32. Hence b = x^(e-32) mod P where x^e
// is wanted: that is folding_constant(e - 32), and {D + 64 - 32, D - 32} is the pair for a distance
// of D bits.
//
// Reduction of V to V * x^32 mod P. First to 96 bits:
//
//   T = lo * (x^96 mod P) + hi * x^32, with x^d at bit 95-d by the rule above
//
// then by Barrett. With m = floor(x^95 / P), a polynomial of 64 bits, the quotient of T by P is
//
//   q = floor(floor(T / x^32) * m / x^63)
//
// exactly. floor(T / x^32) is the first 64 bits of T, and q those of the product. What is left,
// T - q * P, has degree < 32, so only these coefficients of q * P count, and the x^32 of P
// adds nothing to them: P is stored without it.
#pragma once

#include <cstdint>

namespace sdio {
namespace internal {

// P without x^32, reflected.
constexpr uint32_t kPolynomial = 0xEDB88320U;

// a * x mod P.
constexpr uint32_t times_x(uint32_t a) noexcept { return (a >> 1) ^ (kPolynomial & (0U - (a & 1U))); }

// a * b mod P, without branches on data.
constexpr uint32_t multiply_mod_p(uint32_t a, uint32_t b) noexcept {
  uint32_t product = 0;
  for (int bit = 31; bit >= 0; --bit) {
    product ^= b & (0U - ((a >> bit) & 1U));
    b = times_x(b);
  }
  return product;
}

// x^exponent mod P.
constexpr uint32_t power_of_x(uint64_t exponent) noexcept {
  uint32_t result = 0x80000000U;  // x^0
  uint32_t square = 0x40000000U;  // x^1
  for (; exponent != 0; exponent >>= 1) {
    if ((exponent & 1U) != 0) result = multiply_mod_p(result, square);
    square = multiply_mod_p(square, square);
  }
  return result;
}

// x^exponent mod P where the multiply instruction wants it.
constexpr uint64_t folding_constant(uint64_t exponent) noexcept { return uint64_t{power_of_x(exponent)} << 1; }

// The constants that fold a 128-bit accumulator over `nbits` bits.
struct FoldingPair {
  uint64_t lo;
  uint64_t hi;
};

constexpr FoldingPair folding_pair(uint64_t nbits) noexcept {
  return {folding_constant(nbits + 32), folding_constant(nbits - 32)};
}

// floor(x^95 / P), reflected in 64 bits, by long division.
constexpr uint64_t barrett_quotient() noexcept {
  uint64_t quotient = 0;
  uint32_t remainder = 0x80000000U;  // The coefficient of x^95; the 95 below it are zeros.
  for (int power = 94; power >= 0; --power) {
    if (power < 64) quotient |= uint64_t{remainder & 1U} << (63 - power);
    remainder = times_x(remainder);
  }
  return quotient;
}

constexpr uint64_t kReduceTo96 = folding_constant(96);
constexpr uint64_t kBarrettQuotient = barrett_quotient();
constexpr uint64_t kBarrettPolynomial = uint64_t{kPolynomial} << 1;

static_assert(multiply_mod_p(0x80000000U, 0xDEADBEEFU) == 0xDEADBEEFU, "x^0 is the unit");
static_assert(power_of_x(32) == kPolynomial, "x^32 == P - x^32");
static_assert(power_of_x(uint64_t{1} << 32) == power_of_x(1), "P is irreducible of degree 32");

}  // namespace internal
}  // namespace sdio
