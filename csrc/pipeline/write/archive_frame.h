// What an archive has around its payloads: headers, descriptors, the serialization id, the directory. The last three
// depend on the CRCs of payloads.
//
// put() may be called from several threads, provided that every record that lies before has been added or is being
// added by some thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <string>

#include "archive/layout.h"
#include "pipeline/write/record_checksums.h"
#include "pipeline/write/records.h"

namespace sdio {

class ArchiveFrame {
 public:
  enum class Part { kDescriptor, kSerializationId, kDirectory };

  // `layout` is that of `records`. Hashes all names and allocates the directory here, in the caller's thread: malloc
  // would keep such memory in the heap of each worker that had needed it.
  ArchiveFrame(const Records& records, const ArchiveLayout& layout);

  // A piece of a payload: see RecordChecksums::add.
  void add(size_t record, uint64_t record_offset, const char* bytes, uint64_t nbytes, uint32_t crc) {
    checksums_.add(record, record_offset, bytes, nbytes, crc);
  }

  // Each copies bytes [skip, skip + nbytes) of its part to `destination`. put() waits for the CRCs that it needs, and
  // throws Cancelled after cancel().
  void put_header(size_t record, uint64_t skip, uint64_t nbytes, char* destination) const;
  void put(Part part, size_t record, uint64_t skip, uint64_t nbytes, char* destination);
  uint64_t offset_of(Part part, size_t record) const;

  void cancel() { checksums_.cancel(); }

 private:
  struct Tail {
    uint64_t names_hash;
    std::string serialization_id;  // empty until the CRCs are known, as is the directory
    std::string directory;
  };

  const Tail& tail();

  const Records& records_;
  const ArchiveLayout& layout_;
  RecordChecksums checksums_;
  std::mutex tail_mutex_;
  Tail tail_;
};

}  // namespace sdio
