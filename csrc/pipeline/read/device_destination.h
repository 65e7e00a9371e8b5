// A device that payloads are read for, as the pipeline sees it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "pipeline/memory/slot_pool.h"

namespace sdio {

// Bytes [payload_offset, payload_offset + nbytes) of a payload, which lie at `source`. `request` is an index into the
// list of records that was asked for.
struct ArrivedPiece {
  size_t request;
  uint64_t payload_offset;
  uint64_t nbytes;
  const char* source;
};

// Copies that were queued. Destroyed before they have landed, they are waited for: nothing may touch their slot before.
class QueuedCopies {
 public:
  virtual ~QueuedCopies() = default;
  virtual void wait() = 0;  // throws what the device reports
};

class DeviceDestination {
 public:
  virtual ~DeviceDestination() = default;

  // Queues copies of `pieces`, which lie in one slot of slots(), and returns. Called from several workers at once.
  // Throws what the device reports, when nothing is under way any more.
  virtual std::unique_ptr<QueuedCopies> copy(const std::vector<ArrivedPiece>& pieces) = 0;

  // Memory that the device copies from at full speed.
  virtual SlotPool& slots() = 0;
};

}  // namespace sdio
