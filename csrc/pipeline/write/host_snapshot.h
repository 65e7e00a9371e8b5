// A snapshot of a whole archive in host memory: every byte of the file, CRCs included, in slots that nobody else uses.
//
// Copying a payload to its place in the file costs no more than copying it anywhere else, and leaves nothing to do
// later but writes, which can be repeated where a mount refuses the first try. The constructor returns when all is
// copied, and refers to nothing of the records afterwards. memory() may be called from several threads, and different
// regions may be used at once.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "pipeline/memory/slot_pool.h"
#include "pipeline/threads/parallel_regions.h"
#include "pipeline/write/records.h"

namespace sdio {

class HostSnapshot {
 public:
  // `slots` must be memory that the records' device can copy into. Throws std::bad_alloc, and what `watch` or the
  // device throws.
  HostSnapshot(const Records& records, SlotPool& slots, const Watcher& watch);

  // The memory that a snapshot of `records` takes, a whole number of slots. Regions that are all hole take none.
  static uint64_t nbytes_of(const Records& records);

  uint64_t file_nbytes() const { return file_nbytes_; }

  // The kSlotNbytes that begin with the region at `begin`, a multiple of kSlotNbytes. What follows the file's end in
  // them may be overwritten. nullptr where the region is a hole.
  char* memory(uint64_t begin);

 private:
  const uint64_t file_nbytes_;
  std::vector<std::optional<SlotPool::Handle>> regions_;
};

}  // namespace sdio
