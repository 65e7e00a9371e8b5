// Little-endian integers of zip structures, whatever the host's byte order.
#pragma once

#include <cstdint>
#include <type_traits>

namespace sdio {

template <typename Integer>
inline char* put_little_endian(char* destination, Integer value) {
  static_assert(std::is_unsigned<Integer>::value, "zip fields are unsigned");
  for (unsigned byte = 0; byte < sizeof(Integer); ++byte) {
    *destination++ = static_cast<char>(static_cast<unsigned char>(value >> (8 * byte)));
  }
  return destination;
}

inline char* put16(char* destination, uint64_t value) {
  return put_little_endian(destination, static_cast<uint16_t>(value));
}
inline char* put32(char* destination, uint64_t value) {
  return put_little_endian(destination, static_cast<uint32_t>(value));
}
inline char* put64(char* destination, uint64_t value) { return put_little_endian(destination, value); }

template <typename Integer>
inline Integer get_little_endian(const char* source) {
  Integer value = 0;
  for (unsigned byte = 0; byte < sizeof(Integer); ++byte) {
    value = static_cast<Integer>(value | static_cast<Integer>(static_cast<unsigned char>(source[byte])) << (8 * byte));
  }
  return value;
}

inline uint16_t get16(const char* source) { return get_little_endian<uint16_t>(source); }
inline uint32_t get32(const char* source) { return get_little_endian<uint32_t>(source); }
inline uint64_t get64(const char* source) { return get_little_endian<uint64_t>(source); }

}  // namespace sdio
