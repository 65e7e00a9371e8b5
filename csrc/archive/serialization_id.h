// torch's `.data/serialization_id`: 20 decimal digits from the record names, 20 from the CRCs [F: Serialization id].
//
// Pure; thread-compatible.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace sdio {

// The second half: what torch writes is folded, in write order. torch takes any write of 8 bytes or more that begins
// with a data descriptor's signature for a descriptor, and so also folds a payload or a name that happens to begin with
// it.
class CrcFold {
 public:
  // All that is written of one record: its name in the archive, its payload, whose first 8 bytes are at `first_bytes`
  // (null: it has fewer, or they are not written), and the descriptor with its CRC, which an empty record does not
  // have.
  void fold_record(const std::string& archive_name, const std::string& name, const unsigned char* first_bytes,
                   uint64_t nbytes, uint32_t crc);

  // `first_bytes`: the first 8 bytes of a name or payload that has at least 8.
  void fold_write_start(const unsigned char first_bytes[8]);
  void fold_descriptor(uint32_t crc);
  uint64_t value() const { return value_; }

 private:
  uint64_t value_ = 0;
};

// The hash over the first `count` of `names` (without the archive name, in write order). torch iterates its
// std::unordered_set; so does this, and therefore agrees with a torch built on the same standard library.
uint64_t record_names_hash(const std::vector<std::string>& names, size_t count);

std::string serialization_id(uint64_t names_hash, uint64_t folded_crcs);

}  // namespace sdio
