// Copies of payloads in host memory, one behind the other in slots: the host's part of a snapshot whose other part
// stays on devices.
//
// The constructor returns when all is copied; afterwards any thread may read.
#pragma once

#include <sys/uio.h>

#include <cstddef>
#include <cstdint>
#include <vector>

#include "pipeline/memory/slot_pool.h"
#include "pipeline/threads/parallel_regions.h"

namespace sdio {

struct HostBytes {
  const char* data;
  uint64_t nbytes;
};

class PayloadCopies {
 public:
  // Throws std::bad_alloc, and what `watch` throws.
  PayloadCopies(const std::vector<HostBytes>& sources, SlotPool& slots, const Watcher& watch);

  // The memory that copies of `sources` take, a whole number of slots.
  static uint64_t nbytes_of(const std::vector<HostBytes>& sources);

  // Bytes of the copy of sources[index], from `offset` on: as many of `nbytes` as lie together, at least one.
  iovec bytes(size_t index, uint64_t offset, uint64_t nbytes) const;

 private:
  std::vector<uint64_t> starts_;  // where each copy begins, and where one more would
  std::vector<SlotPool::Handle> slots_;
};

}  // namespace sdio
