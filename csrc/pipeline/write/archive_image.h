// An archive assembled in memory: every byte of the file, checksums included, in slots that belong to nobody else.
//
// The snapshot of an asynchronous save. Copying a payload into its place in the file costs no more than copying it
// anywhere else, and leaves nothing but writes for later: as often as it takes, where a mount refuses the first try.
// The constructor takes one thread's time; memory() may be called from several threads, and the memory of different
// regions used by them. Nothing of the content is referred to after construction.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "pipeline/memory/slot_pool.h"
#include "pipeline/threads/parallel_regions.h"
#include "pipeline/write/region_assembler.h"

namespace sdio {

class ArchiveImage {
 public:
  // `slots` must be such as the content's device copies into. Throws std::bad_alloc, and what `watch` or the device
  // throws.
  ArchiveImage(const ArchiveContent& content, SlotPool& slots, const Watcher& watch);

  // Memory that the image of `content` takes, a whole number of slots. Regions that are all hole take none.
  static uint64_t nbytes_of(const ArchiveContent& content);

  uint64_t file_nbytes() const { return file_nbytes_; }

  // kSlotNbytes that begin with the region at `begin`, a multiple of kSlotNbytes; what follows the file's end may be
  // overwritten. nullptr where the region is a hole.
  char* memory(uint64_t begin);

 private:
  const uint64_t file_nbytes_;
  std::vector<std::optional<SlotPool::Handle>> regions_;
};

}  // namespace sdio
