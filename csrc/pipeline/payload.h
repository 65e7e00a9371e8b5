// Where the bytes of records are, and a device as the pipeline sees it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "pipeline/packed_payloads.h"
#include "pipeline/slot_pool.h"

namespace sdio {

struct Payload {
  enum class Kind {
    kMemory,           // `data`, readable until the save ends
    kPacked,           // the source `packed_index` of `packed`, which outlives the save
    kDevice,           // asked of the DeviceSource by record index
    kHole,             // not written, reads as zeros, CRC 0
    kSerializationId,  // known once every other CRC is
  };
  Kind kind = Kind::kMemory;
  const char* data = nullptr;
  const PackedPayloads* packed = nullptr;
  size_t packed_index = 0;
};

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

  // Memory that the device copies into at full speed.
  virtual SlotPool& slots() = 0;
};

}  // namespace sdio
