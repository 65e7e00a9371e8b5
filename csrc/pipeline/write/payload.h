// Where the bytes of a record are.
#pragma once

#include <cstddef>

#include "pipeline/write/packed_payloads.h"

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

}  // namespace sdio
