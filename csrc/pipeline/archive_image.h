// An archive assembled in memory: every byte of the file, checksums included, in slots that belong to nobody else.
//
// The snapshot of an asynchronous save. Copying a payload into its place in the file costs no more than copying it
// anywhere else, and leaves nothing but writes for later. The constructor takes one thread's time; take() may be called
// from several threads for different regions. Nothing of the content is referred to after construction.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "pipeline/parallel_regions.h"
#include "pipeline/region_assembler.h"
#include "pipeline/slot_pool.h"

namespace sdio {

class ArchiveImage {
 public:
  // `slots` must be such as the content's device copies into. Throws std::bad_alloc, and what `watch` or the device
  // throws.
  ArchiveImage(const ArchiveContent& content, SlotPool& slots, const Watcher& watch);

  // Memory that the image of `content` takes, a whole number of slots. Regions that are all hole take none.
  static uint64_t nbytes_of(const ArchiveContent& content);

  uint64_t file_nbytes() const { return file_nbytes_; }

  // The region that begins at `begin`, a multiple of kSlotNbytes, for good: its slot is back in the pool when the
  // caller is done with it. None where it is a hole.
  std::optional<SlotPool::Handle> take(uint64_t begin);

 private:
  const uint64_t file_nbytes_;
  std::vector<std::optional<SlotPool::Handle>> regions_;
};

}  // namespace sdio
