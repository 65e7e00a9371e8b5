// The end records of an archive: where its central directory lies [F: End records].
//
// Pure: bytes in, numbers out; any thread. Nothing here is trusted: every offset and size that comes out lies within
// the file, or CorruptArchive is thrown.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>

namespace sdio {

// The end record is looked for in this many bytes at the end of the file: a comment of 64 KiB may follow it.
inline constexpr uint64_t kEndSearchNbytes = 65535 + 22 + 20 + 56;

struct DirectoryPlacement {
  uint64_t offset = 0;
  uint64_t nbytes = 0;
  uint64_t num_records = 0;
};

struct EndRecord {
  DirectoryPlacement directory;  // as this record says; not checked where there is a zip64 record
  uint64_t offset = 0;           // of the end record in the file
  uint64_t limit_offset = 0;     // the directory ends here or before
  std::optional<uint64_t> zip64_offset;
};

// `tail`: the last min(file_nbytes, kEndSearchNbytes) bytes of the file.
EndRecord find_end_record(const char* tail, uint64_t tail_nbytes, uint64_t file_nbytes);

// `zip64`: kZip64EndNbytes bytes at end.zip64_offset, nullptr where there is none.
DirectoryPlacement directory_placement(const EndRecord& end, const char* zip64);

}  // namespace sdio
