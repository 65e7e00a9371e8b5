// The layout of a torch.save archive: where every byte lies, from names and sizes alone.
//
// Pure: no I/O, no torch, no clock. An ArchiveLayout is immutable after construction and may be read from any thread.
// The numbers and their order are docs/format.md; section names are cited as [F: ...].
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "archive/file_layout.h"

namespace sdio {

struct RecordSpec {
  std::string name;  // without the archive name: "data/0"
  uint64_t nbytes = 0;
};

class ArchiveLayout final : public FileLayout {
 public:
  // `records` in file order; the serialization id is appended as the last record [F: Serialization id].
  // Throws std::invalid_argument for an empty archive name, an alignment of zero or above 2^32 - 1, a name of 64 KiB or
  // more, a repeated name, or sizes whose sum exceeds 2^62 - 1; std::length_error where miniz refuses a central
  // directory of 4 GiB or more.
  ArchiveLayout(std::string archive_name, std::vector<RecordSpec> records, uint64_t alignment);

  const std::string& archive_name() const { return archive_name_; }
  const std::string& name(size_t record) const { return names_[record]; }
  const std::vector<std::string>& names() const { return names_; }
  size_t serialization_id_record() const { return placements_.size() - 1; }
  uint64_t directory_offset() const { return records_end_offset(); }
  uint64_t directory_nbytes() const { return nbytes_behind_records_; }  // with its end records
  const ArchiveLayout* archive() const override { return this; }

  // Each writes exactly the bytes of its placement to `destination`.
  void write_header(size_t record, char* destination) const;
  void write_descriptor(size_t record, uint32_t crc, char* destination) const;

  // Central directory and end records, directory_nbytes() of them; `crcs` holds one CRC a record, the serialization
  // id's included.
  void write_directory(const std::vector<uint32_t>& crcs, char* destination) const;

 private:
  std::string archive_name_;
  uint64_t alignment_;
  std::vector<std::string> names_;
};

}  // namespace sdio
