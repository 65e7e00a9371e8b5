#include "pipeline/archive_reader.h"

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
  const uint64_t stored_nbytes = directory[record].stored_nbytes;
  if (offset > stored_nbytes || nbytes > stored_nbytes - offset) {
    throw std::out_of_range("bytes " + std::to_string(offset) + " to " + std::to_string(offset + nbytes) +
                            " of a record of " + std::to_string(stored_nbytes));
  }
  source.read(read_payload_offset(directory, source, record) + offset, destination, nbytes);
}

}  // namespace sdio
