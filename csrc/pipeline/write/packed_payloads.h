// Payloads in host memory, copied one behind the other into slots: the host's part of a snapshot whose other part stays
// on a device.
//
// The constructor takes one thread's time; afterwards any thread may read.
#pragma once

#include <sys/uio.h>

#include <cstddef>
#include <cstdint>
#include <vector>

#include "pipeline/memory/slot_pool.h"
#include "pipeline/threads/parallel_regions.h"

namespace sdio {

struct PackedSource {
  const char* data;
  uint64_t nbytes;
};

class PackedPayloads {
 public:
  // Throws std::bad_alloc, and what `watch` throws.
  PackedPayloads(const std::vector<PackedSource>& sources, SlotPool& slots, const Watcher& watch);

  // Memory that packing `sources` takes, a whole number of slots.
  static uint64_t nbytes_of(const std::vector<PackedSource>& sources);

  // Bytes of source `index` from `offset` on: at most `nbytes`, at least one, as many as lie together.
  iovec bytes(size_t index, uint64_t offset, uint64_t nbytes) const;

 private:
  std::vector<uint64_t> starts_;  // of each source, and of what would follow the last
  std::vector<SlotPool::Handle> slots_;
};

}  // namespace sdio
