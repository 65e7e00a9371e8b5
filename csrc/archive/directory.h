// Which records there are in a file, and where: of an archive as its central directory says [F: Central directory], of
// a file in another format as whoever has read that format's header does. Those have payloads alone, no local headers.
//
// Pure: bytes in, records out, no I/O. A Directory is immutable after construction and may be read from any thread. Its
// constructors refuse hostile files: all records lie within the file and none overlaps another, so that all payloads
// together are no larger than the file. They throw CorruptArchive, which names the record.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "archive/end_records.h"

namespace sdio {

struct DirectoryRecord {
  uint64_t header_offset = 0;  // of its local header
  uint64_t limit_offset = 0;   // where the next structure of the file begins: the record ends here or before
  uint64_t nbytes = 0;         // of the payload, uncompressed
  uint64_t stored_nbytes = 0;  // in the file
  uint32_t crc32 = 0;
  uint32_t name_offset = 0;  // in the directory's bytes
  uint16_t name_nbytes = 0;
  bool compressed = false;  // deflate
  bool has_header = true;   // a local header; without one the payload begins at header_offset
  uint16_t alignment = 1;   // that the payload needs in memory, where it has no header

  // The local header says where the payload begins: between these two.
  uint64_t min_payload_offset() const;
  uint64_t max_payload_offset() const;
};

// A payload without a header, in a file of another format.
struct PayloadRange {
  uint64_t offset;
  uint64_t nbytes;
  uint16_t alignment;  // that it needs in memory; a power of two
};

class Directory {
 public:
  // `bytes`: those of `placement`.
  Directory(std::string bytes, const DirectoryPlacement& placement);

  // Payloads alone, without names.
  Directory(const std::vector<PayloadRange>& payloads, uint64_t file_nbytes);

  size_t num_records() const { return records_.size(); }
  const DirectoryRecord& operator[](size_t record) const { return records_[record]; }
  std::string_view name(size_t record) const {  // in full, with the archive name
    return {bytes_.data() + records_[record].name_offset, records_[record].name_nbytes};
  }

  // The folder of the first record, as torch takes it; empty where it is in none.
  std::string_view archive_name() const;

  // The payload's offset, from the local header, whose bytes up to min_payload_offset() are at `header`; nobody looks
  // there where the record has none. It and the payload after it lie within [min_payload_offset(), limit_offset).
  // Throws where the header contradicts the directory.
  uint64_t payload_offset(size_t record, const char* header) const;

 private:
  void parse_record(size_t& at, uint64_t directory_offset);
  void check_names() const;
  void set_limits(uint64_t directory_offset);
  [[noreturn]] void fail(size_t record, const std::string& problem) const;

  std::string bytes_;
  std::vector<DirectoryRecord> records_;
};

}  // namespace sdio
