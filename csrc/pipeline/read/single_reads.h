// Reads of one thing at a time: the central directory, the header of a record, bytes of a record. Many records at once
// are read by payload_reader.h.
//
// Any thread. Throws CorruptArchive, UnexpectedEnd and SystemError.
#pragma once

#include <cstddef>
#include <cstdint>

#include "archive/directory.h"
#include "file/positional_source.h"

namespace sdio {

Directory read_directory(PositionalSource& source);

// Reads the record's local header.
uint64_t read_payload_offset(const Directory& directory, PositionalSource& source, size_t record);

// Bytes [offset, offset + nbytes) of the record as it lies in the file, compressed or not. Throws std::out_of_range
// where it has fewer.
void read_stored(const Directory& directory, PositionalSource& source, size_t record, uint64_t offset, uint64_t nbytes,
                 char* destination);

// Rows of one length and at one pitch in the record, the first at `offset`, one after the other into `destination`.
// Throws std::out_of_range where the record is too short for them, or its length overflows.
struct RecordRows {
  uint64_t offset;
  uint64_t row_nbytes;
  uint64_t num_rows;
  uint64_t pitch;  // from the start of one to the start of the next
};
void read_stored_rows(const Directory& directory, PositionalSource& source, size_t record, const RecordRows& rows,
                      char* destination);

}  // namespace sdio
