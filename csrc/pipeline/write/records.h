// The records that go into one archive: where they lie in it, and where their bytes are now.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "archive/file_layout.h"
#include "pipeline/write/device_source.h"
#include "pipeline/write/payload_copies.h"
#include "pipeline/write/read_gate.h"

namespace sdio {

// Where the bytes of one record are.
struct Payload {
  enum class Kind {
    kMemory,           // at `data`, readable until the save ends
    kCopied,           // in Records::copies, under the index `copy`
    kDevice,           // on a device: Records::devices is asked for them by the record's index
    kHole,             // nowhere: they are not written, read as zeros, and have the CRC 0
    kSerializationId,  // known only once the CRCs of all other records are
  };
  Kind kind = Kind::kMemory;
  const char* data = nullptr;
  size_t copy = 0;
};

struct Records {
  std::shared_ptr<const FileLayout> layout;
  std::vector<Payload> payloads;  // one a record, without the serialization id
  bool compute_crc32 = true;
  DeviceSource* devices = nullptr;        // needed for Kind::kDevice
  const PayloadCopies* copies = nullptr;  // needed for Kind::kCopied
  ReadGate* gate = nullptr;               // passed while Kind::kMemory is read; null where nothing moves that memory

  Payload::Kind kind(size_t record) const {
    return record < payloads.size() ? payloads[record].kind : Payload::Kind::kSerializationId;
  }

  // Whether [begin, begin + nbytes) of the file is all hole, so that nothing need be written.
  bool is_hole(uint64_t begin, uint64_t nbytes) const {
    const size_t record = layout->record_at(begin);
    if (record == layout->num_records() || kind(record) != Payload::Kind::kHole) return false;
    const RecordPlacement& at = layout->placement(record);
    return at.payload_offset <= begin && begin + nbytes <= at.descriptor_offset();
  }
};

}  // namespace sdio
