// A device that payloads are written from, as the pipeline sees it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "pipeline/memory/slot_pool.h"

namespace sdio {

// Bytes [record_offset, record_offset + nbytes) of a record, wanted at `destination`, which lies in a slot.
struct DevicePiece {
  size_t record;
  uint64_t record_offset;
  uint64_t nbytes;
  char* destination;
};

class DeviceSource {
 public:
  virtual ~DeviceSource() = default;

  // Copies `pieces`, whose destinations lie in a slot of slots(), and returns when every byte is there, ordered after
  // the work that was queued on the device when the save was called. Called from several workers at once. Throws what
  // the device reports.
  virtual void copy(const std::vector<DevicePiece>& pieces) = 0;

  // Memory into which the device copies at full speed.
  virtual SlotPool& slots() = 0;
};

}  // namespace sdio
