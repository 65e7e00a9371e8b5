// A part of a record that one process writes: a run of bytes in memory that goes to rows at one pitch in the file, as a
// shard of a tensor does, whatever it was cut along.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sdio {

struct Strip {
  const char* data = nullptr;  // readable until the write ends; null: `source_offset` in `source` on a device
  size_t source = 0;
  uint64_t source_offset = 0;
  uint64_t file_offset = 0;  // of the first row
  uint64_t row_nbytes = 0;
  uint64_t num_rows = 0;
  uint64_t file_pitch = 0;    // from row to row
  uint64_t nbytes_after = 0;  // of the record, behind the last row

  uint64_t nbytes() const { return row_nbytes * num_rows; }
  bool on_device() const { return data == nullptr; }
};

struct StripResult {
  uint32_t crc = 0;  // what the strip adds to its record's CRC: to be combined by XOR
  unsigned char first_bytes[8] = {};
};

}  // namespace sdio
