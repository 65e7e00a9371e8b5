// Produces the bytes of any range of the file, and on the way, of an archive, the CRCs that later ranges need.
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
#include <memory>
#include <vector>

#include "archive/file_layout.h"
#include "pipeline/memory/slot_pool.h"
#include "pipeline/write/archive_frame.h"
#include "pipeline/write/records.h"

namespace sdio {

class RegionAssembler {
 public:
  // kAll: the slot gets the whole range. kSmall: it gets the small pieces, and large ones are written from where they
  // are.
  enum class Gather { kAll, kSmall };

  explicit RegionAssembler(const Records& records);

  // Appends to `pieces` the bytes [begin, begin + nbytes) of the file, in order. They lie in `slot` and in the
  // payloads. nbytes <= kSlotNbytes. Throws Cancelled after cancel().
  void assemble(uint64_t begin, uint64_t nbytes, SlotMemory& slot, Gather gather, std::vector<iovec>& pieces);

  void cancel() {
    if (frame_ != nullptr) frame_->cancel();
    if (records_.gate != nullptr) records_.gate->cancel();
  }

 private:
  class Range;

  void add(size_t record, uint64_t record_offset, const char* bytes, uint64_t nbytes, uint32_t crc) {
    if (frame_ != nullptr) frame_->add(record, record_offset, bytes, nbytes, crc);
  }
  uint32_t checksum(const char* bytes, uint64_t nbytes) const;

  const Records& records_;
  const FileLayout& layout_;
  std::unique_ptr<ArchiveFrame> frame_;  // null: the file is payloads and nothing else
  bool computes_crc32_ = false;
};

}  // namespace sdio
