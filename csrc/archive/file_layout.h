// Where the records of a file lie, one behind the other: what the pipeline needs to know of any format.
//
// Immutable after construction; may be read from any thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace sdio {

class ArchiveLayout;

// One record in the file: [header_offset, payload_offset) what the format puts before it; then the payload; then the
// data descriptor, which only archives have, and of those no empty record.
struct RecordPlacement {
  uint64_t header_offset = 0;
  uint64_t payload_offset = 0;
  uint64_t nbytes = 0;
  uint32_t descriptor_nbytes = 0;

  uint64_t header_nbytes() const { return payload_offset - header_offset; }
  uint64_t descriptor_offset() const { return payload_offset + nbytes; }
  uint64_t end_offset() const { return descriptor_offset() + descriptor_nbytes; }
};

class FileLayout {
 public:
  // Payloads of these sizes and nothing else, as in a safetensors file, whose first record is its header. Throws
  // std::invalid_argument where no file can hold them.
  explicit FileLayout(const std::vector<uint64_t>& sizes);
  virtual ~FileLayout() = default;

  size_t num_records() const { return placements_.size(); }
  const RecordPlacement& placement(size_t record) const { return placements_[record]; }
  uint64_t records_end_offset() const { return placements_.empty() ? 0 : placements_.back().end_offset(); }
  uint64_t file_nbytes() const { return records_end_offset() + nbytes_behind_records_; }

  // The record in which `file_offset` lies (header, payload or descriptor), or num_records() behind the last.
  size_t record_at(uint64_t file_offset) const;

  // What frames the records; null: nothing does.
  virtual const ArchiveLayout* archive() const { return nullptr; }

 protected:
  FileLayout() = default;

  std::vector<RecordPlacement> placements_;
  uint64_t nbytes_behind_records_ = 0;
};

// Padding comes on top, so this is a bit clear of what off_t can address.
constexpr uint64_t kMaxFileNbytes = INT64_MAX / 2;

}  // namespace sdio
