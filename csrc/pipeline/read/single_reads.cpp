#include "pipeline/read/single_reads.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

#include "archive/zip_structures.h"

namespace sdio {

Directory read_directory(PositionalSource& source) {
  const uint64_t file_nbytes = source.nbytes();
  const uint64_t tail_nbytes = std::min(file_nbytes, kEndSearchNbytes);
  const uint64_t tail_offset = file_nbytes - tail_nbytes;
  std::string tail(tail_nbytes, '\0');
  source.read(tail_offset, &tail[0], tail_nbytes);
  const auto bytes_at = [&](uint64_t offset, uint64_t nbytes) {
    if (offset >= tail_offset) return tail.substr(offset - tail_offset, nbytes);
    std::string bytes(nbytes, '\0');
    source.read(offset, &bytes[0], nbytes);
    return bytes;
  };
  const EndRecord end = find_end_record(tail.data(), tail_nbytes, file_nbytes);
  std::string zip64;
  if (end.zip64_offset) zip64 = bytes_at(*end.zip64_offset, kZip64EndNbytes);
  const DirectoryPlacement placement = directory_placement(end, zip64.data());
  return Directory(bytes_at(placement.offset, placement.nbytes), placement);
}

uint64_t read_payload_offset(const Directory& directory, PositionalSource& source, size_t record) {
  const DirectoryRecord& at = directory[record];
  std::string header(at.min_payload_offset() - at.header_offset, '\0');
  source.read(at.header_offset, &header[0], header.size());
  return directory.payload_offset(record, header.data());
}

void read_stored(const Directory& directory, PositionalSource& source, size_t record, uint64_t offset, uint64_t nbytes,
                 char* destination) {
  read_stored_rows(directory, source, record, {offset, nbytes, 1, 0}, destination);
}

void read_stored_rows(const Directory& directory, PositionalSource& source, size_t record, const RecordRows& rows,
                      char* destination) {
  if (rows.num_rows == 0) return;
  const uint64_t stored_nbytes = directory[record].stored_nbytes;
  const bool first_is_within = rows.offset <= stored_nbytes && rows.row_nbytes <= stored_nbytes - rows.offset;
  // The number of bytes behind the first row.
  const uint64_t left = first_is_within ? stored_nbytes - rows.offset - rows.row_nbytes : 0;
  if (!first_is_within || (rows.pitch != 0 && rows.num_rows - 1 > left / rows.pitch)) {
    throw std::out_of_range(std::to_string(rows.num_rows) + " rows of " + std::to_string(rows.row_nbytes) +
                            " bytes from byte " + std::to_string(rows.offset) + " of a record of " +
                            std::to_string(stored_nbytes));
  }
  const uint64_t start = read_payload_offset(directory, source, record) + rows.offset;
  for (uint64_t row = 0; row < rows.num_rows; ++row) {
    source.read(start + row * rows.pitch, destination + row * rows.row_nbytes, rows.row_nbytes);
  }
}

}  // namespace sdio
