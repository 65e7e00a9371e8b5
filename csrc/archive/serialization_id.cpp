#include "archive/serialization_id.h"

#include <cstdio>
#include <functional>
#include <unordered_set>

#include "archive/little_endian.h"
#include "archive/zip_structures.h"

namespace sdio {
namespace {

// c10::hash_combine
uint64_t hash_combine(uint64_t seed, uint64_t value) {
  return seed ^ (value + 0x9e3779b9 + (seed << 6u) + (seed >> 2u));
}

}  // namespace

void CrcFold::fold_record(const std::string& archive_name, const std::string& name, const unsigned char* first_bytes,
                          uint64_t nbytes, uint32_t crc) {
  if (archive_name.size() >= 4 && get32(archive_name.data()) == kDescriptorSignature) {
    const std::string full = archive_name + "/" + name;
    if (full.size() >= 8) fold_write_start(reinterpret_cast<const unsigned char*>(full.data()));
  }
  if (first_bytes != nullptr) fold_write_start(first_bytes);
  if (nbytes != 0) fold_descriptor(crc);
}

void CrcFold::fold_write_start(const unsigned char first_bytes[8]) {
  const auto* const bytes = reinterpret_cast<const char*>(first_bytes);
  if (get32(bytes) == kDescriptorSignature) fold_descriptor(get32(bytes + 4));
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
