// Produces the bytes of any range of the archive, and on the way the CRCs that later ranges need.
//
// assemble() may be called from several threads for different ranges, provided that every range before one's own has
// been handed to some thread: a range waits for the CRCs of records that began in earlier ones.
//
// A piece is checksummed while it is in cache, on its way into the slot. The CRC of a record is the XOR of its pieces'
// CRCs, each shifted by the bytes that follow it, so pieces finish in any order. A range with a record's data
// descriptor waits until all pieces of that record are checksummed; the last range, with the serialization id and the
// directory, waits for every CRC. These waits end, because ranges are handed out in ascending order and a thread
// checksums its own pieces before it waits. A device is asked for all its pieces of a range in one call, after the
// host's have been copied.
#pragma once

#include <sys/uio.h>

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

#include "archive/layout.h"
#include "pipeline/memory/slot_pool.h"
#include "pipeline/write/record_checksums.h"
#include "pipeline/write/records.h"

namespace sdio {

class RegionAssembler {
 public:
  // kAll: the slot gets the whole range. kSmall: it gets the small pieces, and large ones are written from where they
  // are.
  enum class Gather { kAll, kSmall };

  // Hashes all names and allocates the directory here, in the caller's thread: malloc would keep such memory in the
  // heap of each worker that had needed it.
  explicit RegionAssembler(const Records& records);

  // Appends to `pieces` the bytes [begin, begin + nbytes) of the file, in order. They lie in `slot` and in the
  // payloads. nbytes <= kSlotNbytes. Throws Cancelled after cancel().
  void assemble(uint64_t begin, uint64_t nbytes, SlotMemory& slot, Gather gather, std::vector<iovec>& pieces);

  void cancel() {
    checksums_.cancel();
    if (records_.gate != nullptr) records_.gate->cancel();
  }

 private:
  struct Tail {
    uint64_t names_hash;
    std::string serialization_id;  // empty until the CRCs are known, as is the directory
    std::string directory;
  };
  class Range;

  const Tail& tail();
  uint32_t checksum(const char* bytes, uint64_t nbytes) const;

  const Records& records_;
  const ArchiveLayout& layout_;
  RecordChecksums checksums_;
  std::mutex tail_mutex_;
  Tail tail_;
};

}  // namespace sdio
