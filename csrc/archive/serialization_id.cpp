#include "archive/serialization_id.h"

#include <cstdio>
#include <functional>
#include <unordered_set>

namespace sdio {
namespace {

// c10::hash_combine
uint64_t hash_combine(uint64_t seed, uint64_t value) {
  return seed ^ (value + 0x9e3779b9 + (seed << 6u) + (seed >> 2u));
}

uint32_t little_endian32(const unsigned char* p) {
  return static_cast<uint32_t>(p[0]) | static_cast<uint32_t>(p[1]) << 8 | static_cast<uint32_t>(p[2]) << 16 |
         static_cast<uint32_t>(p[3]) << 24;
}

constexpr uint32_t kDescriptorSignature = 0x08074b50;

}  // namespace

void CrcFold::fold_write_start(const unsigned char first_bytes[8]) {
  if (little_endian32(first_bytes) == kDescriptorSignature) fold_descriptor(little_endian32(first_bytes + 4));
}

void CrcFold::fold_descriptor(uint32_t crc) { value_ = hash_combine(value_, crc); }

uint64_t record_names_hash(const std::vector<std::string>& names, size_t count) {
  // Growth by rehashing as elements arrive decides the iteration order: no reserve() here.
  const std::unordered_set<std::string> written = [&] {
    std::unordered_set<std::string> set;
    for (size_t i = 0; i < count; ++i) set.insert(names[i]);
    return set;
  }();
  uint64_t combined = 0;
  for (const std::string& name : written) combined = hash_combine(combined, std::hash<std::string>{}(name));
  return combined;
}

std::string serialization_id(uint64_t names_hash, uint64_t folded_crcs) {
  char digits[41];
  std::snprintf(digits, sizeof digits, "%020llu%020llu", static_cast<unsigned long long>(names_hash),
                static_cast<unsigned long long>(folded_crcs));
  return std::string(digits, 40);
}

}  // namespace sdio
