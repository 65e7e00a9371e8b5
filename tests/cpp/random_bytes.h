// Random contents, eight bytes at a time: under a sanitizer or Valgrind a call for each byte takes most of a test.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>

namespace sdio {

// The same for the same seed. SplitMix64.
inline std::string random_bytes(size_t nbytes, uint64_t seed) {
  std::string bytes(nbytes, '\0');
  uint64_t state = seed * 0xD1B54A32D192ED03U;
  for (size_t i = 0; i < nbytes; i += sizeof state) {
    uint64_t word = state += 0x9E3779B97F4A7C15U;
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9U;
    word = (word ^ word >> 27) * 0x94D049BB133111EBU;
    word ^= word >> 31;
    std::memcpy(&bytes[i], &word, nbytes - i < sizeof word ? nbytes - i : sizeof word);
  }
  return bytes;
}

}  // namespace sdio
